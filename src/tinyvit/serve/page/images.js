// Images on the client: files, pastes and drops to bytes and to something a canvas can draw.
export function isImageFile(file) {
  return file.type.startsWith("image/") || /\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|pgm|pnm|avif|jp2)$/i.test(file.name);
}

export const fromDrop = (event) => [...(event.dataTransfer?.files ?? [])];

export function fromPaste(event) {
  return [...(event.clipboardData?.files ?? [])].map((file) => (file.name ? file : new File([file], "pasted.png", { type: file.type })));
}

export async function fromClipboard() {
  for (const item of await navigator.clipboard.read()) {
    const type = item.types.find((name) => name.startsWith("image/"));
    if (type) return new File([await item.getType(type)], "pasted.png", { type });
  }
  return null;
}

// What the browser makes of the file; null where it cannot show it (TIFF, PPM, 16 bits, CMYK).
export async function bitmapOf(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return null;
  }
}

export async function bitmapOfView(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
}

// A smaller copy for the display: a canvas draws 20 megapixels too slowly to pan.
export const MOST = 20_000_000;
export async function forDisplay(bitmap) {
  const pixels = bitmap.width * bitmap.height;
  if (pixels <= MOST) return bitmap;
  const scale = Math.sqrt(MOST / pixels);
  return createImageBitmap(bitmap, { resizeWidth: Math.round(bitmap.width * scale), resizeQuality: "medium" });
}
