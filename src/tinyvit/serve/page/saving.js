// Save, and copy to the clipboard: the dialog, what is chosen in it, the exact masks.
import * as exporting from "./exports.js";
import { bitmapOf } from "./images.js";
import { $, ask } from "./panel.js";
import { outlines } from "./polygons.js";
import { currentOf, isEmpty } from "./state.js";
import { TEXT } from "./text.js";

const EMBEDDED = "tinyvit_sam_2m";

export class Saver {
  // page: {asker, base, say, tell, state(), source(), picture(), about(), onSaved()}
  constructor(page) {
    this.page = page;
    for (const [id, event] of [["simplify", "input"], ["only", "change"]]) {
      $(id).addEventListener(event, () => this.countPoints());
    }
  }
  chosen() {
    const { objects, current } = this.page.state();
    return objects.filter((o) => (!isEmpty(o) || o.given) && (!$("only").checked || o.id === current));
  }
  exact() {
    return this.page.asker.exact(this.page.state().image, this.chosen());
  }
  get tolerance() {
    return Number($("simplify").value);
  }
  async countPoints() {
    try {
      const rings = (await this.exact()).flatMap(({ mask }) => outlines(mask, this.tolerance));
      $("simplified").textContent = TEXT.simplified(this.tolerance, rings.reduce((n, ring) => n + ring.length, 0));
    } catch (error) { this.page.tell(error); }
  }
  async save() {
    const { page } = this, state = page.state(), source = page.source();
    if (!state.objects.some((o) => !isEmpty(o) || o.given)) return page.say(TEXT.nothing);
    this.countPoints();
    if ((await ask($("saving"))) !== "save") return;
    const format = document.querySelector("[name=format]:checked").value;
    try {
      const exact = format === "project" ? [] : await this.exact();
      const needsPixels = format === "cutout" || format === "all";
      const picture = (needsPixels && source && (await bitmapOf(source))) || page.picture();
      const files = await exporting.make(format, state, exact, picture, this.tolerance);
      page.say(TEXT.saved(exporting.save(files, state.image.name)));
      page.onSaved();
    } catch (error) { page.tell(error); }
  }
  async copyMask() {
    const { page } = this, { image, objects } = page.state();
    const object = currentOf(page.state()) ?? objects.at(-1);
    if (!object) return;
    const [{ mask }] = await page.asker.exact(image, [object]);
    const png = new Blob([await exporting.maskPng(mask.data, image)], { type: "image/png" });
    try {
      await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
      page.say(TEXT.copied);
    } catch { exporting.download("mask.png", png); } // no secure context
  }
  async copyText(kind) {
    const { page } = this, name = page.about()?.model?.name;
    const checkpoint = name === EMBEDDED ? null : name ?? null;
    const text = exporting.copyAs(kind, page.base, page.state().image, currentOf(page.state()), checkpoint);
    try { await navigator.clipboard.writeText(text); } catch { /* no secure context: the text is shown below */ }
    $("copied").textContent = text;
    page.say(`${TEXT.copied}: ${text}`);
  }
}
