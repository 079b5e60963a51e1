// The timeline: a row for each node, a bar for each run that it worked on.

const GUTTER = 62; // for the names of rows, at least
const TOP = 16;
const TEXT = 20;
const AXIS = 20;
const BARS_SEEN = 55; // so many bars of middle length are seen at first: single runs can be told apart
const KEYS =
  "Up and down go to the row above and below, Shift with left and right to the bar before and after; each is explained. " +
  "Escape leaves it. Left and right move the picture, plus and minus zoom, 0 shows all, F follows.";
const LISTED = 200; // bars that the table of those in view has at most

async function render({ model, el }) {
  const story = await Story.of(model);
  const heading = frameOf(el, model.get("label"));
  const canvas = make("canvas", { tabIndex: 0, role: "application", dataset: OWN_KEYS });
  canvas.setAttribute("aria-roledescription", "timeline");
  canvas.setAttribute("aria-description", KEYS);
  const said = make("div", { className: "pipeinfer-unseen", role: "status" });
  const tip = make("div", { className: "pipeinfer-tip", hidden: true, role: "tooltip" });
  const buttons = make("div", { className: "pipeinfer-row" });
  const table = make("div", { className: "pipeinfer-scroll" });
  const details = make("details", {}, make("summary", {}, "The same as a table"), table);
  const inView = make("div", { className: "pipeinfer-scroll" });
  const single = make("details", {}, make("summary", {}, "The bars in view as a table"), inView);
  // Of several below one another the first has what all have in common.
  const led = model.get("led");
  el.append(...(led ? [] : [legendOf(story.about.looks)]), canvas, tip, said, ...(led ? [] : [buttons]), details, single);
  const context = canvas.getContext("2d");

  // What is seen, in seconds; `follow` keeps the newest in sight.
  const seen = { from: 0, to: 1, follow: true, chosen: false, live: false, gutter: GUTTER };
  let byRow = [];
  let indexed = 0;
  let lengths = [];
  let patterns = null;
  let source = null;
  let epoch = -1;
  let focused = -1;
  const chosen = { bar: -1 }; // by key

  const plot = () => ({
    width: Math.max(50, canvas.clientWidth - seen.gutter - 6),
    row: Math.max(14, Math.min(26, Math.floor(360 / story.about.nodes.length))),
  });
  const xOf = (time) => seen.gutter + ((time - seen.from) / (seen.to - seen.from)) * plot().width;
  const { lookAt, words, tableOfWork } = tellersFor(model, story);
  const { paintLabel, paintWaves, paintTokens, paintAxis } = marksFor(el, context, seen, plot, xOf);
  const timeAt = (x) => seen.from + ((x - seen.gutter) / plot().width) * (seen.to - seen.from);

  /** Sort new bars into their rows; on each node they follow one another. */
  const index = (trace) => {
    const { bars } = trace.tables;
    if (source !== bars) {
      source = bars;
      byRow = trace.about.nodes.map(() => []);
      lengths = [];
      indexed = 0;
    }
    if (epoch !== trace.epoch) {
      epoch = trace.epoch;
      chosen.bar = -1;
      Object.assign(seen, { from: 0, to: 1, follow: true, chosen: false, live: false });
    }
    seen.live ||= !trace.complete;
    for (; indexed < bars.count; indexed += 1) {
      byRow[bars.row[indexed]].push(indexed);
      const length = bars.ended[indexed] - bars.began[indexed];
      if (bars.row[indexed] > 0 && bars.layers[indexed] && length > 0) lengths.push(length);
    }
  };

  /** How long a piece is in which single runs can be told apart. */
  const readable = (trace) => {
    if (model.get("span") > 0) return model.get("span");
    if (!lengths.length) return Math.max(trace.now, 0.1);
    const sample = lengths.slice(-400).sort((a, b) => a - b);
    return Math.min(Math.max(trace.now, 1e-6), BARS_SEEN * sample[sample.length >> 1]);
  };

  /** When what can be seen ends: of several on one scale, with the last of them. */
  const end = () => Math.max(story.now, model.get("ends"));

  const look = (trace, moment) => {
    const newest = Math.min(moment, end());
    if (!seen.chosen) {
      const span = readable(trace);
      if (moment === Infinity && trace.complete && !seen.live) {
        const first = trace.tables.tokens.time[0] ?? 0;
        seen.from = Math.max(0, Math.min(first - 0.15 * span, trace.now - span));
        seen.to = seen.from + span;
        seen.follow = false;
      } else {
        seen.from = Math.max(0, newest - 0.9 * span);
        seen.to = seen.from + span;
      }
    } else if (seen.follow || (moment !== Infinity && (newest < seen.from || newest > seen.to))) {
      const span = seen.to - seen.from;
      seen.from = Math.max(0, newest - 0.9 * span);
      seen.to = seen.from + span;
    }
  };

  const firstBar = (row, time) => {
    let low = 0;
    let high = row.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (source.ended[row[middle]] < time) low = middle + 1;
      else high = middle;
    }
    return low;
  };

  const draw = (trace) => {
    index(trace);
    const moment = momentOf(model);
    look(trace, moment);
    const { nodes, looks } = trace.about;
    const { works, bars, waves, tokens } = trace.tables;
    const rowNames = trace.about.rows;
    const style = getComputedStyle(el);
    const font = style.fontFamily;
    context.font = `12px ${font}`;
    seen.gutter = Math.max(GUTTER, ...rowNames.map((name) => Math.ceil(context.measureText(name).width) + 8));
    const { width, row: high } = plot();
    const bottom = TOP + nodes.length * high;
    const height = bottom + TEXT + AXIS;
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(1, canvas.clientWidth);
    if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(wide * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
      patterns = null;
    }
    patterns ??= makePatterns(context, looks);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, wide, height);
    const ink = style.color;
    const line = style.getPropertyValue("--pipeinfer-line") || "#ddd";
    context.font = `12px ${font}`;
    context.textBaseline = "middle";

    let drawn = 0;
    let open = 0;
    const rings = [];
    context.save();
    context.beginPath();
    context.rect(seen.gutter, 0, width + 6, height);
    context.clip();
    for (const [row, entries] of byRow.entries()) {
      const y = TOP + row * high;
      context.strokeStyle = line;
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(seen.gutter, y + high / 2);
      context.lineTo(seen.gutter + width, y + high / 2);
      context.stroke();
      for (let at = firstBar(entries, seen.from); at < entries.length; at += 1) {
        const bar = entries[at];
        if (bars.began[bar] > seen.to || bars.began[bar] > moment) break;
        const x = xOf(bars.began[bar]);
        const barWidth = Math.max(1, xOf(Math.min(bars.ended[bar], moment)) - x);
        const work = bars.work[bar];
        const kind = looks[lookAt(bar, moment)];
        drawn += 1;
        open += kind.name === "open";
        if (kind.pattern === "ring") {
          rings.push([kind, x - RING, y, 2 * RING, high]);
          continue;
        }
        // A gap behind each tells bars apart that follow at once.
        paintBar(context, kind, x, y + 2, barWidth - (barWidth > 6), high - 4, patterns);
        if (barWidth > 9) {
          const number = kind.name === "draft" ? "" : String(works.number[work]);
          paintLabel(number, works.text[work], kind, x, y, barWidth, high, ink);
        }
      }
    }
    for (const ring of rings) paintBar(context, ...ring, patterns); // no bar may hide one
    if (chosen.bar >= 0) {
      const x = xOf(bars.began[chosen.bar]);
      context.strokeStyle = ink;
      context.lineWidth = 2;
      const wide = Math.max(1, xOf(bars.ended[chosen.bar]) - x);
      context.strokeRect(x - 2, TOP + bars.row[chosen.bar] * high, wide + 4, high);
    }
    paintWaves(waves, moment, bottom);
    paintTokens(tokens, moment, bottom, ink, line);
    if (moment !== Infinity) {
      context.fillStyle = ink;
      context.fillRect(xOf(moment) - 1, 0, 2, bottom + TEXT);
    }
    context.restore();

    context.fillStyle = ink;
    context.textAlign = "left";
    context.font = `12px ${font}`;
    for (const [row, name] of rowNames.entries()) context.fillText(name, 2, TOP + (row + 0.5) * high);
    context.fillText("text", 2, bottom + TEXT / 2);
    paintAxis(bottom + TEXT, width, ink);

    heading(trace);
    Object.assign(canvas, {
      ariaLabel:
        `Timeline: ${bars.count} bars of ${nodes.length} nodes, ${tokens.count} tokens of text, ` +
        `${waves.count} times runs were called off; the tables below say the same.`,
    });
    Object.assign(el.dataset, {
      bars: bars.count,
      drawn,
      open,
      rings: rings.length,
      waves: waves.count,
      tokens: tokens.count,
      from: seen.from.toFixed(6),
      to: seen.to.toFixed(6),
      follow: seen.follow,
    });
    follower.setAttribute("aria-pressed", seen.follow);
    if (details.open) table.replaceChildren(tableOfWork(trace));
    if (single.open) listBars(trace);
  };

  const listBars = (trace) => {
    const { bars } = trace.tables;
    const rows = [];
    const last = Math.min(seen.to, momentOf(model));
    for (const entries of byRow) {
      for (let at = firstBar(entries, seen.from); at < entries.length && rows.length < LISTED; at += 1) {
        if (bars.began[entries[at]] > last) break;
        rows.push(words(entries[at]));
      }
    }
    const more = rows.length === LISTED ? `The first ${LISTED}; zoom in for the others.` : "";
    inView.replaceChildren(tableOf(["bar", "worker", "text", "work", "layers", "time"], rows), more);
  };

  // --- moving about ----------------------------------------------------------------

  const choose = (from, to, keep = false) => {
    const most = Math.max(end() * 1.02, 1e-3);
    const span = Math.min(Math.max(to - from, 1e-5), most);
    seen.from = Math.max(0, Math.min(from, most - span));
    seen.to = seen.from + span;
    seen.chosen = true;
    seen.follow = keep && seen.follow;
    tell();
  };
  /** Draw what is seen now, and have others on the same scale do so. */
  const tell = () => {
    const { from, to, follow } = seen;
    if (model.get("ends")) {
      model.set("seen", [from, to, Number(follow)]);
      // Or the kernel's late answer to what another one had chosen before would be taken for news.
      model.save_changes();
    }
    redraw();
  };
  const hear = () => {
    const [from, to, follow] = model.get("seen");
    Object.assign(seen, { from, to, follow: Boolean(follow), chosen: true });
    redraw();
  };
  const zoom = (factor, around = (seen.from + seen.to) / 2) => {
    const from = around - (around - seen.from) * factor;
    choose(from, from + (seen.to - seen.from) * factor, true);
  };
  const pan = (share) => {
    const shift = share * (seen.to - seen.from);
    choose(seen.from + shift, seen.to + shift);
  };
  const all = () => choose(0, Math.max(end() * 1.01, 1e-3));
  const toggle = () => {
    seen.chosen = true;
    seen.follow = !seen.follow;
    tell();
  };
  const keys = {
    "+": () => zoom(0.5),
    "=": () => zoom(0.5),
    "-": () => zoom(2),
    ArrowLeft: () => pan(-0.2),
    ArrowRight: () => pan(0.2),
    ArrowUp: () => step(-1, 0),
    ArrowDown: () => step(1, 0),
    "Shift ArrowUp": () => step(-1, 0),
    "Shift ArrowDown": () => step(1, 0),
    "Shift ArrowLeft": () => step(0, -1),
    "Shift ArrowRight": () => step(0, 1),
    Escape: () => leave(),
    Home: () => pan(-1e6),
    End: () => pan(1e6),
    0: all,
    f: toggle,
  };
  canvas.addEventListener("keydown", (event) => {
    const key = event.shiftKey && event.key.startsWith("Arrow") ? `Shift ${event.key}` : event.key;
    const action = keys[key] ?? keys[key.toLowerCase()];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  });
  canvas.addEventListener(
    "wheel",
    (event) => {
      // A page that scrolls past must not be caught: click first, or hold Ctrl.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(event.deltaX / plot().width);
      else zoom(event.deltaY > 0 ? 1.25 : 0.8, timeAt(event.offsetX));
    },
    { passive: false },
  );
  let grabbed = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.focus({ preventScroll: true });
    grabbed = { x: event.offsetX, from: seen.from, to: seen.to };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => (grabbed = null));
  canvas.addEventListener("pointercancel", () => (grabbed = null));
  canvas.addEventListener("pointermove", (event) => {
    if (grabbed && Math.abs(event.offsetX - grabbed.x) > 2) {
      const shift = ((grabbed.x - event.offsetX) / plot().width) * (grabbed.to - grabbed.from);
      choose(grabbed.from + shift, grabbed.to + shift);
    }
    explain(event.offsetX, event.offsetY);
  });
  canvas.addEventListener("pointerleave", () => explain(-1, -1));

  /** The bars of a row that are there at the moment shown. */
  const begun = (row) => (byRow[row] ?? []).filter((bar) => source.began[bar] <= momentOf(model));

  const explain = (x, y) => {
    const entries = x > seen.gutter ? begun(Math.floor((y - TOP) / plot().row)) : [];
    const { looks } = story.about;
    const near = (bar, pixels) => source.began[bar] <= timeAt(x + pixels) && source.ended[bar] >= timeAt(x - pixels);
    focused = -1;
    // Where a ring lies on bars, it is what is pointed at.
    for (let at = firstBar(entries, timeAt(x - RING)); at < entries.length && near(entries[at], RING); at += 1) {
      const ring = looks[source.look[entries[at]]].pattern === "ring";
      if (ring || (focused < 0 && near(entries[at], 2))) focused = entries[at];
      if (ring) break;
    }
    el.dataset.focused = focused;
    show(focused, x, y);
  };

  const show = (bar, x, y) => {
    tip.hidden = bar < 0;
    if (bar < 0) return;
    tip.textContent = words(bar).filter(Boolean).join("\n");
    tip.style.left = `${Math.min(x + 12, Math.max(0, canvas.clientWidth - 280))}px`;
    tip.style.top = `${canvas.offsetTop + y + 14}px`;
  };

  /** Go to the bar so many rows and bars away, bring it into view, and say what it is. */
  const step = (rows, along) => {
    const { bars } = story.tables;
    const middle = (seen.from + seen.to) / 2;
    const from = chosen.bar >= 0 ? chosen.bar : undefined;
    let row = from === undefined ? 0 : bars.row[from];
    if (from !== undefined && rows) {
      do row += rows;
      while (byRow[row] && !begun(row).length);
    } else if (from === undefined) {
      row = Math.max(0, byRow.findIndex((_, at) => begun(at).length));
    }
    const entries = begun(row);
    if (!entries.length) return;
    const near = from === undefined ? middle : (bars.began[from] + bars.ended[from]) / 2;
    const at = rows || from === undefined ? firstBar(entries, near) : entries.indexOf(from) + along;
    chosen.bar = entries[Math.min(Math.max(0, at), entries.length - 1)];
    const half = (seen.to - seen.from) / 2;
    const time = bars.began[chosen.bar];
    if (time < seen.from || bars.ended[chosen.bar] > seen.to) choose(time - half, time + half);
    seen.chosen = true;
    seen.follow = false;
    tell();
    said.textContent = words(chosen.bar).filter(Boolean).join(", ");
    el.dataset.focused = chosen.bar;
    show(chosen.bar, xOf(time), TOP + row * plot().row);
  };
  const leave = () => {
    chosen.bar = -1;
    said.textContent = "";
    show(-1);
    redraw();
  };

  const button = (text, label, action) => {
    const made = make("button", { type: "button", title: label, ariaLabel: label }, text);
    made.addEventListener("click", action);
    buttons.append(made);
    return made;
  };
  button("+", "Zoom in", () => zoom(0.5));
  button("−", "Zoom out", () => zoom(2));
  button("◀", "Earlier", () => pan(-0.5));
  button("▶", "Later", () => pan(0.5));
  button("all", "Show all", all);
  const follower = button("follow", "Keep the newest in sight", toggle);
  buttons.append(
    make("span", { className: "pipeinfer-muted" }, "Drag to move. Click, then wheel or + − to zoom; ← → 0 F work, too; ↑ ↓ and Shift ← → go from bar to bar."),
  );

  const { redraw, stop } = follow(model, el, story, draw);
  details.addEventListener("toggle", () => details.open && table.replaceChildren(tableOfWork(story)));
  single.addEventListener("toggle", () => single.open && listBars(story));
  const sizes = new ResizeObserver(redraw);
  sizes.observe(canvas);
  model.on("change:seen", hear);
  return () => {
    sizes.disconnect();
    model.off("change:seen", hear);
    stop();
  };
}

export default { render };
