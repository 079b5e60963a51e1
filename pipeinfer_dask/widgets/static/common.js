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
 * What all views of a channel share in a page: the tables, which are read once, and who draws them.
 * `epoch` changes with the trace that is shown, and not when a live one is over.
 */
class Story {
  /** The story of a view's model; it is kept at the channel's, whichever module asks first. */
  static async of(model) {
    const id = model.get("channel").slice("IPY_MODEL_".length);
    const channel = await model.widget_manager.get_model(id);
    const key = Symbol.for("pipeinfer story");
    channel[key] ??= new Story(channel);
    return channel[key];
  }

  constructor(channel) {
    this.channel = channel;
    this.followers = new Set();
    this.epoch = 0;
    this.live = false;
    this.updates = 0;
    this.clear();
    channel.on("msg:custom", (message, buffers) => message.kind === "rows" && this.take(buffers[0]));
    channel.on("change", () => this.fromState());
    if (channel.get("complete")) this.fromState();
    else this.resync();
  }

  clear() {
    this.about = this.channel.get("about");
    this.now = 0;
    this.complete = false;
    this.tables = {};
    for (const [name, columns] of this.about.schema) this.tables[name] = new Table(columns);
  }

  resync() {
    this.channel.send({ kind: "resync" }, {});
  }

  renew() {
    for (const follower of this.followers) follower();
  }

  fromState() {
    const rows = this.channel.get("rows");
    if (!this.channel.get("complete") || rows === this.rows) return;
    this.rows = rows;
    this.clear();
    this.epoch += this.live ? 0 : 1;
    this.live = false;
    const texts = this.channel.get("texts");
    for (const [name, table] of Object.entries(this.tables)) {
      if (rows[name]) table.append(rows[name], texts[name]);
    }
    this.now = this.about.now;
    this.complete = true;
    this.renew();
  }

  /** Take a message: a head, then for each table where its rows belong, the rows, and their texts as JSON. */
  take(view) {
    if (view.getUint8(4)) {
      this.clear();
      this.epoch += this.live ? 0 : 1;
      this.live = true;
    }
    const part = (at, length) => new DataView(view.buffer, view.byteOffset + at, length);
    const parts = [];
    for (let at = 5; at < view.byteLength; ) {
      const [number, first, rows, texts] = [view.getUint8(at), ...[1, 5, 9].map((byte) => view.getUint32(at + byte, true))];
      const table = this.tables[this.about.schema[number][0]];
      // Some rows are missing: ask for all, and take none, since tables point into one another.
      if (table.count !== first) return this.resync();
      at += 13;
      parts.push([table, part(at, rows), texts && JSON.parse(new TextDecoder().decode(part(at + rows, texts)))]);
      at += rows + texts;
    }
    for (const [table, rows, texts] of parts) table.append(rows, texts);
    this.now = view.getFloat32(0, true);
    this.updates += 1;
    return this.renew();
  }
}

/**
 * Follow a story: `draw(story)` is called, at most once a frame, when there is something to see, and
 * for what is new at most once in `rest` milliseconds.
 * A view that is alone gets its clock here. Returns {redraw, stop}; `stop` is what `render` gives back to be called at the end.
 */
function follow(model, element, story, draw, rest = 0) {
  let frame = 0;
  let timer = 0;
  let last = -Infinity;
  let inSight = true;
  let stale = false;
  let drawn = "";
  const redraw = () => {
    // What nobody sees is drawn when another trace begins or ends, and when it comes into sight.
    stale = !inSight && drawn === `${story.epoch} ${story.complete}`;
    if (stale || frame) return;
    frame = requestAnimationFrame(() => {
      frame = 0;
      last = performance.now();
      drawn = `${story.epoch} ${story.complete}`;
      draw(story);
      element.dataset.complete = story.complete;
      element.dataset.theme = isDark() ? "dark" : "light";
      element.dataset.draws = 1 + Number(element.dataset.draws || 0);
    });
  };
  const renew = () => {
    element.dataset.updates = story.updates;
    clearTimeout(timer);
    const wait = story.complete ? 0 : last + rest - performance.now();
    if (wait > 0) timer = setTimeout(redraw, wait);
    else redraw();
  };
  story.followers.add(renew);
  model.on("change:moment", redraw);
  const sight = new IntersectionObserver((entries) => {
    inSight = entries[entries.length - 1].isIntersecting;
    if (inSight && stale) redraw();
  });
  sight.observe(element);
  const themes = new MutationObserver(redraw);
  themes.observe(document.body, {
    attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "style"],
  });
  redraw();
  const shown = hidePicture(model);
  const clock = model.get("alone") ? clockOf(model) : null;
  if (clock) element.querySelector(".pipeinfer-heading").after(clock.row);
  const stop = () => {
    story.followers.delete(renew);
    model.off("change:moment", redraw);
    sight.disconnect();
    themes.disconnect();
    cancelAnimationFrame(frame);
    clearTimeout(timer);
    clock?.stop();
    shown();
  };
  return { redraw, stop };
}

/** Hide the picture that stands for a view where it can't live; returns what shows it again. */
function hidePicture(model) {
  const sheet = make("style");
  const hide = () => {
    const name = model.get("picture");
    sheet.textContent = name ? `.${name}, .jp-OutputArea-child:has(> .jp-OutputArea-output > .${name}) { display: none; }` : "";
  };
  model.on("change:picture", hide);
  hide();
  document.head.append(sheet);
  return () => {
    model.off("change:picture", hide);
    sheet.remove();
  };
}

/** The moment that is to be shown, in seconds: the chosen one, or else the newest. */
function momentOf(model) {
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
  const { dataset, classList } = document.body;
  const contrasty = classList.contains("vscode-high-contrast") && !classList.contains("vscode-high-contrast-light");
  return dataset.jpThemeLight === "false" || classList.contains("vscode-dark") || contrasty;
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

/** A table of texts. */
function tableOf(headings, rows) {
  const cells = (tag, texts, properties) => make("tr", {}, ...texts.map((text) => make(tag, properties, text)));
  const body = rows.map((row) => cells("td", row));
  return make("table", {}, make("thead", {}, cells("th", headings, { scope: "col" })), make("tbody", {}, ...body));
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
function frameOf(element, label) {
  element.classList.add("pipeinfer");
  const heading = make("div", { className: "pipeinfer-heading" });
  element.append(heading);
  const update = (trace, note = "") => {
    const { title } = trace.about;
    const state = trace.complete ? "" : trace.now > 0 ? " · live" : " · waiting";
    heading.textContent = [label, title].filter(Boolean).join(" · ") + state + note;
  };
  return update;
}
