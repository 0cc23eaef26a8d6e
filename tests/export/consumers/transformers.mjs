// Run transformers.js' SamModel on an exported folder; it knows no tinyvit.
// Usage: node transformers.mjs FOLDER IMAGE.png CLICKS.json OUTPUT.bin, in a folder with node_modules.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";

const require = createRequire(process.cwd() + "/");
const { AutoProcessor, RawImage, SamModel, env } = require("@huggingface/transformers");
const [folder, picture, clicks, output] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const model = await SamModel.from_pretrained(basename(folder), { dtype: "fp32" });
const processor = await AutoProcessor.from_pretrained(basename(folder));
const image = await RawImage.read(picture);
const shapes = [];
const parts = [];
for (const click of JSON.parse(readFileSync(clicks))) {
  const inputs = await processor(image, { input_points: [[click]] });
  const outputs = await model(inputs);
  const masks = await processor.post_process_masks(
    outputs.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes);
  const scores = Array.from(outputs.iou_scores.data);
  const best = scores.indexOf(Math.max(...scores));
  const [, kinds, height, width] = masks[0].dims;
  const size = height * width;
  parts.push(Buffer.from(masks[0].data.slice(best * size, (best + 1) * size)));
  shapes.push({ pixels: inputs.pixel_values.dims, scores: outputs.iou_scores.dims,
    low_res: outputs.pred_masks.dims, masks: [kinds, height, width] });
}
writeFileSync(output, Buffer.concat(parts));
console.log(JSON.stringify(shapes));
