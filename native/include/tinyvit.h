/* TinyViT in one small library: the image encoders of MobileSAM and its family, TinyViT classifiers
 * and EfficientSAM3's students, on a CPU, without dependencies.
 *
 *   tinyvit_config config = TINYVIT_CONFIG_INIT;       // sizes of the network
 *   tinyvit_net* net = NULL;
 *   tinyvit_error error;
 *   if (tinyvit_create(&config, tensors, count, &net, &error)) return fail(error.message);
 *   tinyvit_images images = TINYVIT_IMAGES_INIT;       // where the pixels are
 *   tinyvit_outputs outputs = TINYVIT_OUTPUTS_INIT;    // where the results go
 *   if (tinyvit_encode(net, &images, &outputs, &error)) return fail(error.message);
 *   tinyvit_destroy(net);
 *
 * Rules. Every call that can fail returns a tinyvit_status and, where `error` is not null, a text.
 * No exception leaves the library, nothing is printed, there is no global state: any number of nets
 * live side by side. One net may be used by many threads: calls without a workspace of their own
 * wait for each other. A struct starts with its size, so that later versions can add fields.
 *
 * The same input gives the same bits for any number of threads, any batch and on every run with the
 * same instruction set.
 */
#ifndef TINYVIT_H
#define TINYVIT_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TINYVIT_API __declspec(dllexport)
#else
#define TINYVIT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a program compiled against another header would break. */
#define TINYVIT_ABI_VERSION 2
#define TINYVIT_MAX_STAGES 8
#define TINYVIT_MAX_CHANNELS 16

typedef enum tinyvit_status {
  TINYVIT_OK = 0,
  TINYVIT_INVALID = 1,       /* an argument, a config or a tensor is wrong; the text says which */
  TINYVIT_UNSUPPORTED = 2,   /* the processor or this build lacks it */
  TINYVIT_OUT_OF_MEMORY = 3, /* the net is as usable as before */
  TINYVIT_INTERNAL = 4       /* a fault of the library */
} tinyvit_status;

typedef struct tinyvit_error {
  int32_t status;
  char message[508]; /* UTF-8, ends with 0 */
} tinyvit_error;

/* ABI version of the library that was loaded; compare it with TINYVIT_ABI_VERSION. */
TINYVIT_API uint32_t tinyvit_abi_version(void);
/* "0.1.0". */
TINYVIT_API const char* tinyvit_version(void);
/* 1 where bf16 products are instructions of the kernels that would be taken; 0: emulated, slow. */
TINYVIT_API int32_t tinyvit_has_bf16(void);

typedef enum tinyvit_stem { TINYVIT_STEM_CONV = 0, TINYVIT_STEM_POINTWISE = 1 } tinyvit_stem;

/* What follows the last stage and gives the embedding. */
typedef enum tinyvit_end {
  TINYVIT_END_NONE = 0, /* nothing: the embedding is the last stage's map */
  TINYVIT_END_SAM = 1,  /* SAM's neck: neck.0 to neck.3 */
  TINYVIT_END_SAM3 = 2  /* EfficientSAM3's, resized to end_size: neck.0, .1 and .3, or head.0 ... */
} tinyvit_end;

typedef enum tinyvit_precision { TINYVIT_FP32 = 0, TINYVIT_BF16 = 1 } tinyvit_precision;

/* The network. Sizes that the tensors tell (hidden widths, kernel sides, classes) are not repeated. */
typedef struct tinyvit_config {
  uint32_t struct_size; /* sizeof(tinyvit_config) */
  int32_t in_chans;
  int32_t num_stages;
  int32_t embed_dims[TINYVIT_MAX_STAGES];
  int32_t depths[TINYVIT_MAX_STAGES];
  int32_t num_heads[TINYVIT_MAX_STAGES];    /* [0] is not used: the first stage has no attention */
  int32_t window_sizes[TINYVIT_MAX_STAGES]; /* likewise */
  int32_t strides[TINYVIT_MAX_STAGES];      /* of the merge behind each stage but the last: 1 or 2 */
  int32_t stem;                             /* tinyvit_stem */
  int32_t end;                              /* tinyvit_end */
  int32_t end_size;                         /* side of SAM 3's embedding, 72 */
  int32_t head;                             /* 1: norm_head, and head where it is there */
  int32_t precision;                        /* tinyvit_precision */
  int32_t threads;                          /* 0: as many as the process has CPUs */
  const char* isa; /* null: the best of this processor; else generic, avx2, avx512, avx512bf16, amx.
                      The environment variable TINYVIT_ISA lowers the best. */
} tinyvit_config;

#define TINYVIT_CONFIG_INIT                                                                       \
  { sizeof(tinyvit_config), 3, 4, {64, 128, 160, 320}, {2, 2, 6, 2}, {2, 4, 5, 10},               \
    {7, 7, 14, 7}, {2, 2, 1}, TINYVIT_STEM_CONV, TINYVIT_END_SAM, 72, 0, TINYVIT_FP32, 0, NULL }

/* A tensor in C order, under its name in TinyViT's state dict ("layers.1.blocks.0.attn.qkv.weight").
 * Batch norms and the affine part of layer norms are folded when the net is made; tensors whose
 * norms are folded already are taken too ("patch_embed.seq.0.weight" and ".bias", no norms). */
typedef struct tinyvit_tensor {
  const char* name;
  const float* data;
  int32_t ndim;
  int64_t shape[4];
} tinyvit_tensor;

typedef struct tinyvit_net tinyvit_net;

/* Makes a net. The tensors are copied. Tensors that the network does not have are passed over. */
TINYVIT_API tinyvit_status tinyvit_create(const tinyvit_config* config,
                                          const tinyvit_tensor* tensors, size_t count,
                                          tinyvit_net** net, tinyvit_error* error);
/* Null is fine. No call may be running. */
TINYVIT_API void tinyvit_destroy(tinyvit_net* net);

typedef struct tinyvit_info {
  uint32_t struct_size;
  char isa[16];
  int32_t precision;
  int32_t threads;
  int32_t is_native; /* 0: bf16 products are emulated here, and slower than fp32 */
  uint64_t weight_bytes;
  uint64_t workspace_bytes; /* that the net keeps for itself now */
} tinyvit_info;

TINYVIT_API tinyvit_status tinyvit_describe(const tinyvit_net* net, tinyvit_info* info,
                                            tinyvit_error* error);

/* Sizes of the results for images of height by width. */
typedef struct tinyvit_sizes {
  uint32_t struct_size;
  int32_t embedding[3];                  /* channels, height, width */
  int32_t num_stages;
  int32_t stages[TINYVIT_MAX_STAGES][3]; /* of each stage, before its merge */
  int32_t early[3];                      /* behind the second merge; 0 where there is none */
  int32_t num_logits;                    /* 0 without a head */
  uint64_t workspace_bytes;              /* for a batch of one */
} tinyvit_sizes;

TINYVIT_API tinyvit_status tinyvit_measure(const tinyvit_net* net, int32_t height, int32_t width,
                                           tinyvit_sizes* sizes, tinyvit_error* error);

typedef enum tinyvit_pixels {
  TINYVIT_FLOAT_PLANES = 0, /* float [batch][channel][height][width], normalised */
  TINYVIT_BYTES = 1         /* uint8 [batch][height][width][channel]; (x - mean) / std is computed */
} tinyvit_pixels;

typedef struct tinyvit_images {
  uint32_t struct_size;
  int32_t pixels; /* tinyvit_pixels */
  const void* data;
  int32_t batch, height, width;
  int32_t padded_height, padded_width; /* at least height and width, or 0 for those: zeros are added
                                          at the bottom and right after normalising, as SAM does */
  float mean[TINYVIT_MAX_CHANNELS], std[TINYVIT_MAX_CHANNELS]; /* of bytes, in 0 to 255 */
} tinyvit_images;

#define TINYVIT_IMAGES_INIT { sizeof(tinyvit_images), TINYVIT_FLOAT_PLANES, NULL, 0, 0, 0, 0, 0, {0}, {0} }

typedef enum tinyvit_layout { TINYVIT_PLANES = 0, TINYVIT_CHANNELS_LAST = 1 } tinyvit_layout;

/* Where results go; null means not wanted, and what nothing asked for needs is not computed. */
typedef struct tinyvit_outputs {
  uint32_t struct_size;
  int32_t layout;   /* tinyvit_layout of embedding and stages */
  float* embedding; /* [batch] of tinyvit_sizes.embedding */
  float* logits;    /* [batch][num_logits] */
  float* stages[TINYVIT_MAX_STAGES];
  float* early;     /* [batch][height][width][channel], what Light HQ-SAM's decoder wants */
  void* workspace;  /* null: the net's own memory */
  uint64_t workspace_bytes;
} tinyvit_outputs;

#define TINYVIT_OUTPUTS_INIT { sizeof(tinyvit_outputs), TINYVIT_PLANES, NULL, NULL, {0}, NULL, NULL, 0 }

/* Runs the network on a batch. A batch of 0 does nothing. */
TINYVIT_API tinyvit_status tinyvit_encode(tinyvit_net* net, const tinyvit_images* images,
                                          const tinyvit_outputs* outputs, tinyvit_error* error);

/* Gives the net's own workspace back; the next call takes a new one. */
TINYVIT_API void tinyvit_trim(tinyvit_net* net);

/* -- masks ------------------------------------------------------------------------------------- */

typedef struct tinyvit_decoder_config {
  uint32_t struct_size;
  int32_t num_heads;                 /* of every attention, 8 */
  int32_t grid_height, grid_width;   /* of the features of a padded image, 64 */
  int32_t input_height, input_width; /* of the model's input in pixels, 1024 */
  int32_t threads;
  const char* isa;
} tinyvit_decoder_config;

#define TINYVIT_DECODER_CONFIG_INIT { sizeof(tinyvit_decoder_config), 8, 64, 64, 1024, 1024, 0, NULL }

/* SAM's prompt encoder and mask decoder, in fp32; Light HQ-SAM's where its tensors are there. One may
 * be used by many threads, which wait for each other. Tensors are those of a SAM's state dict,
 * "prompt_encoder..." and "mask_decoder...". */
typedef struct tinyvit_decoder tinyvit_decoder;
/* What all prompts on an image share; it belongs to the decoder that made it. */
typedef struct tinyvit_prepared tinyvit_prepared;

TINYVIT_API tinyvit_status tinyvit_decoder_create(const tinyvit_decoder_config* config,
                                                  const tinyvit_tensor* tensors, size_t count,
                                                  tinyvit_decoder** decoder, tinyvit_error* error);
TINYVIT_API void tinyvit_decoder_destroy(tinyvit_decoder* decoder);

/* The encoder's results for one image. */
typedef struct tinyvit_embedding {
  uint32_t struct_size;
  int32_t channels, height, width;
  const float* features; /* [channels][height][width] */
  int32_t early_channels;
  const float* early;    /* null, or for Light HQ-SAM [height][width][early_channels] */
} tinyvit_embedding;

TINYVIT_API tinyvit_status tinyvit_prepare(const tinyvit_decoder* decoder, const tinyvit_embedding* embedding,
                                           tinyvit_prepared** prepared, tinyvit_error* error);
TINYVIT_API void tinyvit_prepared_destroy(tinyvit_prepared* prepared);
TINYVIT_API uint64_t tinyvit_prepared_bytes(const tinyvit_prepared* prepared);

/* Prompts of one kind, each for a mask of its own; coordinates are pixels of the model's input. */
typedef struct tinyvit_prompts {
  uint32_t struct_size;
  int32_t count;
  int32_t num_points;     /* of each prompt */
  int32_t multimask;      /* 0: one mask; else the masks of an ambiguous prompt. Light HQ-SAM corrects
                             the best of those, and always gives one */
  int32_t hq_only;        /* 1: Light HQ-SAM's mask alone, instead of the correction by it */
  const float* points;    /* null, or [count][num_points][2], x and y */
  const int32_t* labels;  /* [count][num_points]: 1 the object, 0 not the object, -1 no point */
  const float* boxes;     /* null, or [count][4]: left, top, right, bottom */
  const float* masks;     /* null, or [count][4 height][4 width] logits */
  const float* min_score; /* null, or what a mask's score must exceed: logits of others are not
                             computed, and their place is not written to */
} tinyvit_prompts;

/* logits: [count][masks][4 height][4 width]; scores: [count][masks], the predicted IoU. `masks` is 1
 * or, of an ambiguous prompt, `num_masks` as this call reports it: count 0 only reports. */
TINYVIT_API tinyvit_status tinyvit_decode(tinyvit_decoder* decoder, const tinyvit_prepared* prepared,
                                          const tinyvit_prompts* prompts, float* logits, float* scores,
                                          int32_t* num_masks, tinyvit_error* error);

/* Where an image lies in the model's input, and what its logits cover of that. */
typedef struct tinyvit_placement {
  uint32_t struct_size;
  int32_t covered_height, covered_width;   /* pixels of the input that all logits cover, padding too */
  int32_t resized_height, resized_width;   /* the image's part of it */
  int32_t original_height, original_width; /* pixels of the image */
} tinyvit_placement;

/* Logits [count][height][width] in the image's own pixels, [count][original height][original width],
 * as segment-anything enlarges them; one of the two results. Masks are 1 above the threshold, else 0. */
TINYVIT_API tinyvit_status tinyvit_enlarge(const float* logits, int32_t count, int32_t height, int32_t width,
                                           const tinyvit_placement* placement, float threshold,
                                           uint8_t* masks, float* values, tinyvit_error* error);

/* How the masks of many prompts are looked at. */
typedef struct tinyvit_search {
  uint32_t struct_size;
  float threshold;              /* logits above it are mask */
  float offset;                 /* stability: the IoU of the masks this much above and below it */
  float min_stability;          /* less stable masks get no run lengths; 0 takes all */
  int32_t frame_height, frame_width; /* the whole image, of which this one may be a crop */
  int32_t top, left;            /* where the crop begins */
} tinyvit_search;

typedef struct tinyvit_region {
  int32_t prompt, mask;
  float score, stability;  /* the stability of no pixels is no number */
  int32_t box[4];          /* x0, y0, x1, y1 in the frame, the first and the last pixel */
  uint64_t area;           /* pixels */
  const int64_t* counts;   /* COCO's run lengths in the frame; null where it is not stable enough */
  uint64_t num_counts;
} tinyvit_region;

/* Masks whose score exceeds prompts->min_score, in the order of prompts and their masks. Neither their
 * logits in the image's size nor whole masks are ever kept. scores: [count][masks] or null. */
typedef struct tinyvit_regions tinyvit_regions;
TINYVIT_API tinyvit_status tinyvit_find(tinyvit_decoder* decoder, const tinyvit_prepared* prepared,
                                        const tinyvit_prompts* prompts, const tinyvit_placement* placement,
                                        const tinyvit_search* search, tinyvit_regions** regions,
                                        float* scores, tinyvit_error* error);
/* The regions, `count` of them; they belong to `regions`. */
TINYVIT_API const tinyvit_region* tinyvit_regions_list(const tinyvit_regions* regions, uint64_t* count);
TINYVIT_API void tinyvit_regions_destroy(tinyvit_regions* regions);

#ifdef __cplusplus
}
#endif
#endif
