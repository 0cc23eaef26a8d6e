// A ZIP file of stored (not compressed) entries.
const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

export function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

// entries: [[name, Uint8Array]] -> Blob
export function zip(entries) {
  const encoder = new TextEncoder();
  const parts = [], directory = [];
  let offset = 0;
  for (const [name, data] of entries) {
    const path = encoder.encode(name);
    const fields = [0x0800, 0, 0, 0x21, crc32(data), data.length, data.length, path.length, 0]; // UTF-8 names, 1980-01-01
    const head = pack([[4, 0x04034b50], [2, 20], ...shape(fields)]);
    parts.push(head, path, data);
    const more = [[2, 0], [2, 0], [2, 0], [4, 0], [4, offset]];
    directory.push(pack([[4, 0x02014b50], [2, 20], [2, 20], ...shape(fields), ...more]), path);
    offset += head.length + path.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const n = entries.length;
  const tail = pack([[4, 0x06054b50], [2, 0], [2, 0], [2, n], [2, n], [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, tail], { type: "application/zip" });
}

const shape = (f) => [2, 2, 2, 2, 4, 4, 4, 2, 2].map((bytes, i) => [bytes, f[i]]);

function pack(fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [bytes]) => sum + bytes, 0)));
  let at = 0;
  for (const [bytes, value] of fields) {
    if (bytes === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += bytes;
  }
  return new Uint8Array(view.buffer);
}
