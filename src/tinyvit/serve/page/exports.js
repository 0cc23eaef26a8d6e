// What can be saved: PNG, label map, cut-out, COCO, SVG, labelme, project; and "copy as".
import { promptOf, toProject } from "./state.js";
import { outlines } from "./polygons.js";
import { zip } from "./zip.js";

export const FORMATS = [
  ["png", "Masks (PNG, one each)"],
  ["labels", "Label map (PNG with indices)"],
  ["cutout", "Cut-outs with transparency (PNG)"],
  ["coco", "COCO (JSON)"],
  ["svg", "Outlines (SVG)"],
  ["labelme", "Polygons (labelme JSON)"],
  ["project", "Project (JSON, opens here again)"],
  ["all", "All of these (ZIP)"],
];

const encoder = new TextEncoder();
const bytesOf = (value) => encoder.encode(typeof value === "string" ? value : JSON.stringify(value, null, 1));
const stem = (name) => (name || "image").replace(/\.[^.]*$/, "");
export const safe = (name) => name.replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(0, 80) || "object";

// exact: [{object, score, rle, area, box, mask}] in the order of the objects; picture: what is shown;
// tolerance: of outlines. Gives [[file name, bytes]].
export async function make(format, state, exact, picture, tolerance = 0) {
  const image = state.image, name = stem(image.name);
  if (format === "all") {
    const found = [];
    for (const [one] of FORMATS.slice(0, -1)) {
      for (const [file, data] of await make(one, state, exact, picture, tolerance)) {
        found.push([one === "cutout" ? `cutouts/${file}` : file, data]);
      }
    }
    return found;
  }
  if (format === "project") return [[`${name}.tinyvit.json`, bytesOf(toProject(state))]];
  if (format === "coco") return [[`${name}.coco.json`, bytesOf(coco(image, exact))]];
  if (format === "svg") return [[`${name}.svg`, bytesOf(svg(image, exact, tolerance))]];
  if (format === "labelme") return [[`${name}.json`, bytesOf(labelme(image, exact, tolerance))]];
  if (format === "labels") {
    const data = new Uint8ClampedArray(4 * image.width * image.height);
    for (let i = 3; i < data.length; i += 4) data[i] = 255;
    if (exact.length > 255) throw new Error("a label map holds at most 255 objects");
    exact.forEach(({ mask: { data: mask } }, index) => {
      for (let i = 0; i < mask.length; i++) if (mask[i]) data.fill(index + 1, 4 * i, 4 * i + 3);
    });
    return [[`${name}.labels.png`, await toPng(data, image)]];
  }
  const used = new Set();
  return Promise.all(exact.map(async ({ object, mask: { data: mask } }) => {
    let file = safe(object.name);
    for (let n = 2; used.has(file); n++) file = `${safe(object.name)}_${n}`;
    used.add(file);
    return [`${name}.${file}.png`, format === "png" ? await maskPng(mask, image) : await cutout(mask, image, picture)];
  }));
}

export function maskPng(mask, image) {
  const data = new Uint8ClampedArray(4 * mask.length);
  for (let i = 0; i < mask.length; i++) {
    data.fill(mask[i] ? 255 : 0, 4 * i, 4 * i + 3);
    data[4 * i + 3] = 255;
  }
  return toPng(data, image);
}

function cutout(mask, image, picture) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  const own = canvas.getContext("2d");
  own.drawImage(picture, 0, 0, image.width, image.height);
  const pixels = own.getImageData(0, 0, image.width, image.height);
  for (let i = 0; i < mask.length; i++) if (!mask[i]) pixels.data[4 * i + 3] = 0;
  return toPng(pixels.data, image);
}

async function toPng(data, { width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  return new Uint8Array(await (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer());
}

function coco(image, exact) {
  return {
    images: [{ id: 1, file_name: image.name, width: image.width, height: image.height }],
    categories: [{ id: 1, name: "object" }],
    annotations: exact.map(({ object, score, rle, area, box }, index) => ({
      id: index + 1, image_id: 1, category_id: 1, segmentation: rle, bbox: box, area, iscrowd: 0,
      score, predicted_iou: score, prompt: promptOf(object),
    })),
  };
}

function svg(image, exact, tolerance) {
  const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const paths = exact.map(({ object, mask }) => {
    const d = outlines(mask, tolerance).map((ring) => `M${ring.map((p) => p.join(" ")).join("L")}Z`).join("");
    return `  <path fill-rule="evenodd" d="${d}"><title>${escape(object.name)}</title></path>\n`;
  });
  const size = `width="${image.width}" height="${image.height}" viewBox="0 0 ${image.width} ${image.height}"`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size}>\n${paths.join("")}</svg>\n`;
}

function labelme(image, exact, tolerance) {
  const shapes = exact.flatMap(({ object, mask }, index) => outlines(mask, tolerance)
    .filter((ring) => area(ring) > 0) // labelme has no holes
    .map((points) => ({
      label: object.name, points, group_id: index + 1, shape_type: "polygon", flags: {}, description: "",
    })));
  return {
    version: "5.5.0", flags: {}, shapes, imagePath: image.name, imageData: null,
    imageHeight: image.height, imageWidth: image.width,
  };
}

const area = (ring) => ring.reduce((sum, [x, y], i) => {
  const [u, v] = ring[(i + 1) % ring.length];
  return sum + x * v - u * y;
}, 0);

export function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// One file as it is, several as a ZIP.
export function save(entries, name) {
  if (entries.length === 1) {
    const [[file, data]] = entries;
    download(file, new Blob([data]));
    return file;
  }
  const file = `${stem(name)}.zip`;
  download(file, zip(entries));
  return file;
}

// The command, the Python and the curl that give this very mask. chosen: one of the three, or null; checkpoint: null
// for the embedded one.
export function copyAs(kind, base, image, object, checkpoint) {
  const file = image.name || "image.png", { chosen } = object;
  const points = object.points.map((p) => [p.x, p.y, p.label]);
  const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  if (kind === "command") {
    const words = points.map((p) => ` --point ${p.join(",")}`).join("");
    const more = `${object.box ? ` --box ${object.box.join(",")}` : ""}${checkpoint ? ` --checkpoint ${shell(checkpoint)}` : ""}`;
    const which = chosen === null ? "" : ` --multimask  # ${stem(file)}.mask-1-${chosen + 1}.png`;
    return `tinyvit segment ${shell(file)}${words}${more} -o masks${which}`;
  }
  if (kind === "curl") {
    const query = [...points.map((p) => `point=${p.join(",")}`), ...(object.box ? [`box=${object.box.join(",")}`] : [])];
    if (chosen !== null) query.push("which=all");
    const which = chosen === null ? "" : `  # .objects[0].masks[${chosen}]`;
    return `curl -T ${shell(file)} '${new URL("v1/segment", base)}?${query.join("&")}'${which}`;
  }
  const fields = [];
  if (points.length) {
    fields.push(`points=${JSON.stringify(points.map((p) => p.slice(0, 2)))}`);
    fields.push(`labels=${JSON.stringify(points.map((p) => p[2]))}`);
  }
  if (object.box) fields.push(`box=${JSON.stringify(object.box)}`);
  const model = checkpoint ? JSON.stringify(checkpoint) : "";
  return [
    "import tinyvit", "",
    `prompt = tinyvit.Prompt(${fields.join(", ")})`,
    `for masks in tinyvit.Segmenter(${model}).segment([${JSON.stringify(file)}], [[prompt]]):`,
    `    mask = masks.mask(0${chosen === null ? "" : `, ${chosen}`})`, "",
  ].join("\n");
}
