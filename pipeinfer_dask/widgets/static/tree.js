// The tree: the end of the text, and the tokens that are guessed to follow it.

const BOX = { width: 96, height: 47, gapX: 18, gapY: 6, before: 2, most: 80 };
const SMALLEST = 0.7; // a tree that is too wide is drawn smaller as far as it can be read, and then scrolls

const KINDS = {
  text: { meaning: "text", colour: "var(--pipeinfer-accepted)", wide: 3 },
  asked: { meaning: "a guess, the target is asked", colour: "#cc79a7", wide: 1.5 },
  guessed: { meaning: "only guessed", colour: "#cc79a7", wide: 1.5, dashes: "4 3" },
  out: { meaning: "ruled out just now", colour: "#d55e00", wide: 1.5, struck: true },
};

function frameAt({ colour, wide, dashes = "none" }, x, y, width, height) {
  return makeSvg("rect", {
    x, y, width, height, rx: Math.min(5, height / 4), fill: "var(--jp-layout-color1, #fff)",
    stroke: colour, "stroke-width": wide, "stroke-dasharray": dashes,
  });
}

async function render({ model, el }) {
  const story = await Story.of(model);
  const heading = frameOf(el, model.get("label"));
  const holder = make("div", { className: "pipeinfer-scroll", tabIndex: 0, role: "group", ariaLabel: "Draft tree" });
  const key = make("div", { className: "pipeinfer-row" });
  for (const kind of Object.values(KINDS)) {
    const swatch = makeSvg("svg", { width: 30, height: 14, "aria-hidden": "true" }, frameAt(kind, 2, 2, 26, 10));
    if (kind.struck) swatch.append(makeSvg("path", { d: "M6 7H24", stroke: "currentColor" }));
    key.append(make("span", { className: "pipeinfer-key" }, swatch, kind.meaning));
  }
  for (const meaning of ["%: how sure the draft model is", "slot: place in the cache"]) {
    key.append(make("span", { className: "pipeinfer-key pipeinfer-muted" }, meaning));
  }
  const table = make("div", { className: "pipeinfer-scroll pipeinfer-words" });
  const details = make("details", {}, make("summary", {}, "The same as a table"), table);
  el.append(holder, key, details);

  /** The guesses that are there at a moment, and those that the last commitment ruled out. */
  const stateAt = (trace, moment) => {
    const { tokens, guesses, placed, settled } = trace.tables;
    const count = upTo(tokens.time, moment);
    const last = count ? tokens.time[count - 1] : -1;
    const ended = new Map();
    const rows = upTo(settled.time, moment);
    for (let row = 0; row < rows; row += 1) ended.set(settled.guess[row], row);
    const runs = new Map();
    const places = upTo(placed.time, moment);
    for (let row = 0; row < places; row += 1) runs.set(placed.guess[row], row);
    const children = new Map();
    let open = 0;
    let gone = 0;
    const made = upTo(guesses.made, moment);
    for (let guess = 0; guess < made; guess += 1) {
      const row = ended.get(guess);
      const kept = row !== undefined && settled.kept[row];
      const out = row !== undefined && !kept;
      if (kept || (out && settled.time[row] < last)) continue;
      const parent = guesses.parent[guess];
      if (!children.has(parent)) children.set(parent, []);
      children.get(parent).push({ guess, out });
      if (out) gone += 1;
      else open += 1;
    }
    const text = [];
    for (let row = Math.max(0, count - BOX.before); row < count; row += 1) text.push(tokens.guess[row]);
    return { text, children, runs, open, gone };
  };

  const draw = (trace) => {
    const { guesses, placed } = trace.tables;
    const { text, children, runs, open, gone } = stateAt(trace, momentOf(model));
    const boxes = [];
    let row = 0;
    let left = BOX.most;
    const place = (guess, depth, out, parent) => {
      const box = { guess, depth, out, parent, row: 0 };
      boxes.push(box);
      left -= 1;
      const below = (children.get(guess) ?? []).filter(() => left > 0);
      const rows = below.map((child) => place(child.guess, depth + 1, child.out, box).row);
      box.row = rows.length ? (rows[0] + rows[rows.length - 1]) / 2 : row++;
      return box;
    };
    // The text is one chain; what had hung beside it hangs below its own tokens.
    const chain = (at) => {
      const guess = text[at];
      if (at === text.length - 1) return place(guess, at, false, null);
      const box = { guess, depth: at, out: false, parent: null, row: 0, text: true };
      boxes.push(box);
      const next = chain(at + 1);
      next.parent = box;
      for (const child of children.get(guess) ?? []) if (left > 0) place(child.guess, at + 1, child.out, box);
      box.row = next.row;
      return box;
    };
    if (text.length) chain(0);
    const wide = (BOX.width + BOX.gapX) * (1 + Math.max(0, ...boxes.map((box) => box.depth))) - BOX.gapX + 4;
    const high = (BOX.height + BOX.gapY) * Math.max(1, row) + 8;
    const svg = makeSvg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "list", "aria-label": `Draft tree: ${open} guesses open, ${gone} ruled out just now` });
    Object.assign(svg.style, { width: "100%", minWidth: `${SMALLEST * wide}px`, maxWidth: `${wide}px` });
    const x = (box) => 2 + box.depth * (BOX.width + BOX.gapX);
    const y = (box) => 4 + box.row * (BOX.height + BOX.gapY);
    for (const box of boxes) {
      if (box.parent) {
        const middle = BOX.height / 2;
        svg.append(makeSvg("path", {
          d: `M${x(box.parent) + BOX.width} ${y(box.parent) + middle}C${x(box) - 5} ${y(box.parent) + middle} ${x(box) - 13} ${y(box) + middle} ${x(box)} ${y(box) + middle}`,
          fill: "none", stroke: "currentColor", "stroke-opacity": 0.5,
          "stroke-width": 0.7 + 2.5 * guesses.confidence[box.guess],
        }));
      }
    }
    const rows = []; // of the table
    for (const box of boxes) {
      const isText = text.includes(box.guess);
      const run = runs.get(box.guess);
      const kind = KINDS[isText ? "text" : box.out ? "out" : run !== undefined ? "asked" : "guessed"];
      const word = visible(guesses.text[box.guess]);
      const sure = isText ? "" : `${Math.round(100 * guesses.confidence[box.guess])}%`;
      const before = box.parent ? visible(guesses.text[box.parent.guess]) : "";
      const after = box.parent ? `, after ${before}` : "";
      const where = run !== undefined ? `run ${placed.run[run]} slot ${placed.slot[run]}` : "";
      if (!isText) rows.push([word, before, kind.meaning, sure, where]);
      const group = makeSvg("g", {
        opacity: box.out ? 0.65 : 1, role: "listitem",
        "aria-label": [`${word}: ${kind.meaning}`, sure].filter(Boolean).join(", ") + after,
      });
      group.append(
        frameAt(kind, x(box), y(box), BOX.width, BOX.height),
        makeSvg("text", {
          x: x(box) + 7, y: y(box) + 14, "font-family": "monospace", "font-weight": "bold",
          "text-decoration": kind.struck ? "line-through" : "none",
        }, word.slice(0, 11)),
        makeSvg("text", { x: x(box) + 7, y: y(box) + 27, opacity: 0.8 }, sure),
        makeSvg("text", { x: x(box) + 7, y: y(box) + 40, opacity: 0.8, style: where.length > 14 ? "font-size: 10px" : "" }, where),
      );
      svg.append(group);
    }
    holder.replaceChildren(text.length ? svg : make("div", { className: "pipeinfer-muted" }, "No text yet."));
    if (details.open) table.replaceChildren(tableOf(["guess", "after", "what it is", "how sure", "where"], rows));
    const hidden = left <= 0 ? `, the first ${BOX.most} shown` : "";
    heading(trace, ` · ${open} guesses open${hidden}`);
    Object.assign(el.dataset, { open, gone, boxes: boxes.length });
  };

  const { redraw, stop } = follow(model, el, story, draw, 250);
  details.addEventListener("toggle", redraw);
  return stop;
}

export default { render };
