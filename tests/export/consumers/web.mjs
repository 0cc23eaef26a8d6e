// Run an exported pair by onnxruntime-web's wasm, as a page does; it knows no tinyvit.
// Usage: node web.mjs FOLDER INPUTS.json OUTPUT.json, in a folder with node_modules. INPUTS holds
// {file, inputs: {name: {dims, data}}} for each run; an input "=NAME" is an output of the run before.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(process.cwd() + "/");
const ort = require("onnxruntime-web");
const [folder, source, output] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
let before = {};
const found = [];
for (const { file, inputs } of JSON.parse(readFileSync(source))) {
  const session = await ort.InferenceSession.create(readFileSync(join(folder, file)));
  const given = {};
  for (const [name, value] of Object.entries(inputs)) {
    given[name] = typeof value === "string" ? before[value.slice(1)]
      : new ort.Tensor("float32", Float32Array.from(value.data), value.dims);
  }
  before = await session.run(given);
  found.push(Object.fromEntries(Object.entries(before).map(
    ([name, tensor]) => [name, { dims: tensor.dims, data: Array.from(tensor.data) }])));
}
writeFileSync(output, JSON.stringify(found));
