// What the page knows: objects as prompts, never as masks. Pure functions and one small class.
const STEPS = 200;

export function newState() {
  return { image: null, objects: [], current: null, next: 1 };
}

export function newObject(state) {
  return { id: state.next, name: `object ${state.next}`, points: [], box: null, chosen: null, finished: false };
}

export const isEmpty = (object) => !object.points.length && !object.box;
export const keyOf = (object) => JSON.stringify([object.points, object.box]);
export const currentOf = (state) => state.objects.find((o) => o.id === state.current) ?? null;

export function promptOf(object) {
  const prompt = { name: object.name };
  if (object.points.length) {
    prompt.points = object.points.map((p) => [p.x, p.y]);
    prompt.labels = object.points.map((p) => p.label);
  }
  if (object.box) prompt.box = [...object.box];
  return prompt;
}

// Each change is a function from a state to a new one; the old one is never touched.
export const changes = {
  open: (state, image) => ({ ...newState(), image }),
  begin(state) {
    const object = newObject(state);
    const objects = state.objects.filter((o) => !isEmpty(o) || o.finished);
    return { ...state, objects: [...objects, object], current: object.id, next: state.next + 1 };
  },
  point(state, x, y, label) {
    const base = withCurrent(state);
    return edit(base, (o) => ({ ...o, points: [...o.points, { x, y, label }], chosen: null, finished: false }));
  },
  removePoint: (state, index) =>
    edit(state, (o) => ({ ...o, points: o.points.filter((_, i) => i !== index), chosen: null, finished: false })),
  movePoint: (state, index, x, y) =>
    edit(state, (o) => ({
      ...o, points: o.points.map((p, i) => (i === index ? { ...p, x, y } : p)), chosen: null, finished: false,
    })),
  box(state, box) {
    const base = withCurrent(state);
    return edit(base, (o) => ({ ...o, box, chosen: null, finished: false }));
  },
  choose: (state, index) => edit(state, (o) => ({ ...o, chosen: index })),
  rename: (state, id, name) => editOne(state, id, (o) => ({ ...o, name: name.slice(0, 200) || o.name })),
  finish: (state) => ({ ...edit(state, (o) => ({ ...o, finished: true })), current: null }),
  select: (state, id) => ({ ...state, current: id }),
  remove(state, id) {
    const objects = state.objects.filter((o) => o.id !== id);
    return { ...state, objects, current: state.current === id ? null : state.current };
  },
  add(state, made) {
    const object = { ...newObject(state), ...made };
    return { ...state, objects: [...state.objects, object], current: object.id, next: state.next + 1 };
  },
};

function withCurrent(state) {
  return currentOf(state) ? state : changes.begin(state);
}
function edit(state, change) {
  return editOne(state, state.current, change);
}
function editOne(state, id, change) {
  return { ...state, objects: state.objects.map((o) => (o.id === id ? change(o) : o)) };
}

// Undo and redo over every change, in all objects.
export class History {
  constructor(state = newState()) {
    this.state = state;
    this.past = [];
    this.future = [];
  }
  apply(name, ...values) {
    const next = changes[name](this.state, ...values);
    if (name === "open") {
      this.past = [];
    } else if (name !== "select") {
      this.past.push(this.state);
      if (this.past.length > STEPS) this.past.shift();
    }
    if (name !== "select") this.future = [];
    this.state = next;
    return next;
  }
  undo() {
    if (!this.past.length) return false;
    this.future.push(this.state);
    this.state = this.past.pop();
    return true;
  }
  redo() {
    if (!this.future.length) return false;
    this.past.push(this.state);
    this.state = this.future.pop();
    return true;
  }
  hasUnsaved() {
    return this.state.objects.some((o) => !isEmpty(o) && !o.saved);
  }
}

// The project as a file, and back.
export function toProject(state) {
  return { tinyvit: "project", format: 1, image: state.image, objects: state.objects };
}
export function fromProject(value) {
  if (value?.tinyvit !== "project" || !(value.format <= 1) || !Array.isArray(value.objects)) {
    throw new Error("this is no project of this page, or one of a newer version");
  }
  const objects = value.objects.map((o, i) => ({ ...newObject({ next: i + 1 }), ...o, id: i + 1 }));
  return { image: value.image, objects, current: null, next: objects.length + 1 };
}
