// Parts of the page. What comes from a model or a gallery becomes text nodes and never markup.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

export class Refused extends Error {
  constructor(answer, status) {
    super(answer?.error || `the server answered with status ${status}`);
    this.problems = answer?.problems || [];
    this.status = status;
  }
}

export async function ask(path, body) {
  const options = body === undefined
    ? {}
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new Refused(answer, response.status);
  return answer;
}

let numbers = 0;
export function field(name, control, hint) {
  const id = control.id || `field${(numbers += 1)}`;
  control.id = id;
  const label = el("label", { for: id }, name);
  const parts = [label, control];
  if (hint) {
    control.setAttribute("aria-describedby", `${id}-hint`);
    parts.push(el("span", { id: `${id}-hint`, class: "muted" }, hint));
  }
  return el("div", { class: "field" }, parts);
}

// Radio buttons that look like tabs or chips; the arrow keys of a keyboard move between them.
export function choices(host, name, entries, chosen, changed) {
  const focused = host.contains(document.activeElement);
  host.replaceChildren();
  if (entries.length < 2) return;
  for (const [value, words] of entries) {
    const input = el("input", { type: "radio", name, value, onchange: () => changed(value) });
    input.checked = value === chosen;
    host.append(el("label", { class: "choice" }, input, el("span", {}, words)));
  }
  if (focused) host.querySelector("input:checked")?.focus(); // the arrow keys go on from there
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result).split(",", 2)[1] || "");
    reader.onerror = () => reject(new Error("the picture cannot be read"));
    reader.readAsDataURL(file);
  });
}

export class TextInput {
  constructor(name, kind, text = "") {
    this.control = el("textarea", { rows: 3, spellcheck: kind === "text", class: kind === "text" ? "" : "code" });
    this.control.value = text;
    if (kind === "molecule") this.control.placeholder = "CC(=O)Oc1ccccc1C(=O)O";
    this.node = field(kind === "molecule" ? `${name} (SMILES)` : name, this.control);
  }

  async value() {
    if (!this.control.value.trim()) throw new Error("Type a query first.");
    return this.control.value;
  }
}

export class NumbersInput {
  constructor(name) {
    this.control = el("textarea", { rows: 3, class: "code", placeholder: "0.4, 1.2, 3.0" });
    this.node = field(name, this.control, "numbers, separated by blanks or commas");
  }

  async value() {
    const words = this.control.value.split(/[\s,;]+/).filter(Boolean);
    const values = words.map(Number);
    if (!values.length) throw new Error("Give some numbers first.");
    const wrong = words.find((word, i) => !Number.isFinite(values[i]));
    if (wrong !== undefined) throw new Error(`“${wrong}” is not a number.`);
    return values;
  }
}

export class PictureInput {
  constructor(name, changed = () => {}) {
    this.file = null;
    this.url = null;
    this.changed = changed;
    this.picker = el("input", {
      type: "file", accept: "image/*", "aria-label": `${name}: choose a picture`,
      onchange: () => this.take(this.picker.files[0]),
    });
    this.inside = el("div", {}, el("strong", {}, "Drop a picture here"), el("br"), el("span", { class: "muted" }, "or click, or paste one"));
    this.zone = el("div", { class: "drop" }, this.inside, this.picker);
    for (const event of ["dragenter", "dragover"]) {
      this.zone.addEventListener(event, (e) => { e.preventDefault(); this.zone.classList.add("over"); });
    }
    for (const event of ["dragleave", "drop"]) {
      this.zone.addEventListener(event, () => this.zone.classList.remove("over"));
    }
    this.zone.addEventListener("drop", (e) => {
      e.preventDefault();
      const picture = [...e.dataTransfer.files].find((file) => file.type.startsWith("image/"));
      if (picture) this.take(picture);
    });
    this.node = el("div", { class: "field" }, el("span", { class: "name" }, name), this.zone);
  }

  pasted(event) {
    const picture = [...(event.clipboardData?.files || [])].find((file) => file.type.startsWith("image/"));
    if (picture) this.take(picture);
    return Boolean(picture);
  }

  take(file) {
    if (!file) return;
    this.file = file;
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = URL.createObjectURL(file);
    this.shown = el("img", { src: this.url, alt: `The chosen picture, ${file.name || "pasted"}` });
    this.inside.replaceChildren(this.shown);
    this.changed(this);
  }

  async value() {
    if (!this.file) throw new Error("Choose a picture first.");
    return { image: await base64(this.file) };
  }
}

// Boxes over a picture; fractions of its sides, first and second in different colours.
export function boxesOver(boxes, sides = [1, 1]) {
  const shapes = boxes.flatMap(([left, top, right, bottom], i) => {
    const place = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
    return [svg("rect", { ...place, class: "halo" }), svg("rect", { ...place, class: i === 1 ? "second" : "first" })];
  });
  return svg("svg", { viewBox: `0 0 ${sides[0]} ${sides[1]}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes);
}

// Small pictures are shown larger, so that what is drawn over them can be told apart.
export function enlarged(image) {
  const grow = () => { if (image.naturalWidth < 420) image.style.width = "420px"; };
  if (image.complete && image.naturalWidth) grow();
  else image.addEventListener("load", grow);
  return image;
}

// Two objects in a photo: drawn with a pointer, or typed as numbers.
export class PairInput {
  constructor(name, withNames) {
    this.boxes = [null, null];
    this.photo = new PictureInput(name, () => this.opened());
    this.stage = el("div", {});
    this.fields = [0, 1].map((at) => this.numbers(at));
    this.names = withNames ? ["Name of the first object", "Name of the second object"].map((text) => el("input", { type: "text", "aria-label": text, placeholder: text })) : [];
    this.node = el("div", { class: "input" }, this.photo.node, this.stage);
  }

  numbers(at) {
    return ["left", "top", "right", "bottom"].map((edge, i) => el("input", {
      type: "number", min: 0, step: 1, placeholder: edge, "aria-label": `${at ? "Second" : "First"} object, ${edge} in pixels`,
      onchange: () => {
        const values = this.fields[at].map((input) => input.valueAsNumber);
        this.boxes[at] = values.every(Number.isFinite) ? values : null;
        this.paint();
        return i;
      },
    }));
  }

  opened() {
    this.boxes = [null, null];
    const image = enlarged(el("img", { src: this.photo.url, alt: "The chosen picture", draggable: "false" }));
    this.image = image;
    this.photo.node.hidden = true;
    this.editor = el("div", { class: "editor" }, image);
    let from = null;
    const at = (event) => {
      const frame = image.getBoundingClientRect();
      const x = Math.min(1, Math.max(0, (event.clientX - frame.left) / frame.width));
      const y = Math.min(1, Math.max(0, (event.clientY - frame.top) / frame.height));
      return [Math.round(x * image.naturalWidth), Math.round(y * image.naturalHeight)];
    };
    this.editor.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      this.editor.setPointerCapture(event.pointerId);
      if (this.boxes[0] && this.boxes[1]) this.boxes = [null, null];
      from = at(event);
    });
    this.editor.addEventListener("pointermove", (event) => {
      if (!from) return;
      const to = at(event);
      const box = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
      this.drawn = box;
      this.paint(box);
    });
    this.editor.addEventListener("pointerup", () => {
      from = null;
      if (this.drawn && this.drawn[2] > this.drawn[0] && this.drawn[3] > this.drawn[1]) {
        this.boxes[this.boxes[0] ? 1 : 0] = this.drawn;
      }
      this.drawn = null;
      this.paint();
    });
    this.stage.replaceChildren(
      el("div", { class: "input" },
        el("div", { class: "lead" },
          el("p", { class: "muted" }, "Draw a box around the first object, then around the second; or type their edges."),
          el("button", { type: "button", class: "link", onclick: () => this.photo.picker.click() }, "Another picture")),
        this.editor,
        ...[0, 1].map((i) => el("div", { class: "field" }, el("span", { class: "name" }, i ? "Second object" : "First object"), this.names[i], el("div", { class: "numbers" }, this.fields[i])))));
  }

  paint(extra) {
    this.editor.querySelector("svg")?.remove();
    const boxes = this.boxes.slice();
    if (extra) boxes[boxes[0] ? 1 : 0] = extra;
    const shown = boxes.filter(Boolean);
    this.editor.append(boxesOver(shown, [this.image.naturalWidth || 1, this.image.naturalHeight || 1]));
    boxes.forEach((box, i) => this.fields[i].forEach((input, edge) => { input.value = box ? box[edge] : ""; }));
  }

  pasted(event) { return this.photo.pasted(event); }

  async value() {
    const { image } = await this.photo.value();
    if (!this.boxes[0] || !this.boxes[1]) throw new Error("Draw a box around each of the two objects first.");
    const names = this.names.map((input) => input.value.trim());
    if (names.length && names.some((each) => !each)) throw new Error("Name both objects first.");
    return { image, first: this.boxes[0], second: this.boxes[1], ...(names.length ? { names } : {}) };
  }

  get url() { return this.photo.url; }

  get called() { return this.names.map((input) => input.value.trim()); }
}

// An item of the gallery that was chosen as the query.
export class ItemInput {
  constructor(item, view, drop) {
    this.item = item;
    const value = item.shown[view];
    const thumb = el("div", { class: "thumb" });
    if (value?.url) thumb.append(plate(value, item.id));
    this.node = el("div", { class: "chosen" }, thumb,
      el("div", { class: "what" },
        el("p", { class: "id" }, `from the gallery: ${item.id}`),
        value?.text && !value.url ? el("p", { class: "words" }, value.text) : null,
        el("button", { type: "button", class: "link", onclick: drop }, "Use something else")));
  }
}

export function plate(value, name, small = false) {
  const image = el("img", { src: value.url, alt: value.text || name, loading: "lazy", decoding: "async" });
  const frame = el("div", { class: small ? "plate small" : "plate" }, image);
  image.addEventListener("error", () => { image.remove(); frame.classList.add("broken"); });
  if (value.boxes) {
    image.addEventListener("load", () => {
      // The picture keeps its proportions inside the plate: boxes lie over the part that it covers.
      const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
      const over = boxesOver(value.boxes);
      frame.append(over);
      over.style.inset = "auto";
      over.style.width = `${image.naturalWidth * scale}px`;
      over.style.height = `${image.naturalHeight * scale}px`;
    });
  }
  return frame;
}
