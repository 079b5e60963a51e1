// What all views share: the tables of a trace, and following them as they grow.

const READ = {
  u1: (view, at) => view.getUint8(at),
  u2: (view, at) => view.getUint16(at, true),
  u4: (view, at) => view.getUint32(at, true),
  i4: (view, at) => view.getInt32(at, true),
  f4: (view, at) => view.getFloat32(at, true),
};
const SIZE = { u1: 1, u2: 2, u4: 4, i4: 4, f4: 4 };

/** `data-` of an element whose keys are its own: the notebook's shortcuts are off there, as 0 0 that restarts a kernel. */
const OWN_KEYS = { lmSuppressShortcuts: "true" };

/** A table of rows that are only ever added: an array for each column, under its name. */
class Table {
  constructor(columns) {
    this.columns = columns;
    this.rowBytes = columns.reduce((sum, [, type]) => sum + SIZE[type], 0);
    this.count = 0;
    this.text = [];
    for (const [name] of columns) this[name] = [];
  }

  append(view, texts) {
    for (let at = 0; at < view.byteLength; at += this.rowBytes) {
      let offset = at;
      for (const [name, type] of this.columns) {
        this[name].push(READ[type](view, offset));
        offset += SIZE[type];
      }
      this.count += 1;
    }
    if (texts) for (const text of texts) this.text.push(text);
  }
}

/**
 * Follow a trace: `draw(trace)` is called, at most once a frame, when there is something new.
 * Returns {trace, redraw, stop}; `stop` is what `render` gives back to be called at the end.
 */
function follow(model, element, draw) {
  // `epoch` changes with the trace that is shown, and not when a live one is over.
  const trace = { tables: {}, now: 0, complete: false, about: model.get("about"), epoch: 0 };
  let live = false;
  const clear = () => {
    trace.about = model.get("about");
    trace.now = 0;
    trace.complete = false;
    for (const [name, columns] of Object.entries(trace.about.schema)) {
      trace.tables[name] = new Table(columns);
    }
  };
  let frame = 0;
  const redraw = () => {
    if (!frame) {
      frame = requestAnimationFrame(() => {
        frame = 0;
        draw(trace);
        element.dataset.complete = trace.complete;
        element.dataset.theme = isDark() ? "dark" : "light";
        element.dataset.draws = 1 + Number(element.dataset.draws || 0);
      });
    }
  };
  const fromState = () => {
    if (!model.get("complete")) return;
    clear();
    trace.epoch += live ? 0 : 1;
    live = false;
    const rows = model.get("rows");
    const texts = model.get("texts");
    for (const name of Object.keys(trace.tables)) {
      if (rows[name]) trace.tables[name].append(rows[name], texts[name]);
    }
    trace.now = trace.about.now;
    trace.complete = true;
    redraw();
  };
  const onMessage = (message, buffers) => {
    if (message.kind !== "rows") return;
    if (message.reset) {
      clear();
      trace.epoch += live ? 0 : 1;
      live = true;
    }
    for (const [index, [name, first, texts]] of message.tables.entries()) {
      if (trace.tables[name].count !== first) {
        model.send({ kind: "resync" }); // some rows are missing: ask for all
        return;
      }
      trace.tables[name].append(buffers[index], texts);
    }
    trace.now = message.now;
    element.dataset.updates = 1 + Number(element.dataset.updates || 0);
    redraw();
  };
  model.on("msg:custom", onMessage);
  model.on("change:complete", fromState);
  model.on("change:moment", redraw);
  const themes = new MutationObserver(redraw);
  themes.observe(document.body, {
    attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "style"],
  });
  clear();
  if (model.get("complete")) fromState();
  else {
    model.send({ kind: "resync" });
    redraw();
  }
  const stop = () => {
    model.off("msg:custom", onMessage);
    model.off("change:complete", fromState);
    model.off("change:moment", redraw);
    themes.disconnect();
    cancelAnimationFrame(frame);
  };
  return { trace, redraw, stop };
}

/** The moment that is to be shown, in seconds: the chosen one, or else the newest. */
function momentOf(model, trace) {
  const chosen = model.get("moment");
  return chosen >= 0 ? chosen : Infinity;
}

/** How many leading rows of a column that only grows are not after a moment. */
function upTo(column, moment) {
  let low = 0;
  let high = column.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (column[middle] <= moment) low = middle + 1;
    else high = middle;
  }
  return low;
}

function isDark() {
  return document.body.dataset.jpThemeLight === "false";
}

/** Make an element; text goes in as text and never as markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { dataset, style, ...plain } = properties;
  for (const [name, value] of Object.entries(plain)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  Object.assign(element.dataset, dataset);
  Object.assign(element.style, style);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A token as it can be seen: spaces and line ends have signs. */
function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function ms(seconds, digits = 1) {
  return `${(1e3 * seconds).toFixed(digits)} ms`;
}

/** Round moments between two, in seconds, at most `most`. */
function ticks(from, to, most) {
  const rough = Math.max(to - from, 1e-9) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(from / step - 1e-9);
  const found = [];
  for (let n = first; n * step <= to + 1e-12; n += 1) found.push(n * step);
  return found;
}

/** A frame for a view: a heading and what it shows. */
function frameOf(element, about) {
  element.classList.add("pipeinfer");
  const heading = make("div", { className: "pipeinfer-heading" });
  element.append(heading);
  const update = (trace, note = "") => {
    const { title, label } = trace.about;
    const state = trace.complete ? "" : trace.now > 0 ? " · live" : " · waiting";
    heading.textContent = [label, title].filter(Boolean).join(" · ") + state + note;
  };
  return update;
}
