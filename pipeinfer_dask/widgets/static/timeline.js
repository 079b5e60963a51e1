// The timeline: a row for each node, a bar for each run that it worked on.

const GUTTER = 62;
const TOP = 16;
const TEXT = 20;
const AXIS = 20;
const BARS_SEEN = 55; // so many bars of middle length are seen at first: single runs can be told apart

async function render({ model, el }) {
  const story = await Story.of(model);
  const heading = frameOf(el, model.get("label"));
  const canvas = make("canvas", { tabIndex: 0, role: "img", dataset: OWN_KEYS });
  const tip = make("div", { className: "pipeinfer-tip", hidden: true, role: "tooltip" });
  const buttons = make("div", { className: "pipeinfer-row" });
  const table = make("div", { className: "pipeinfer-scroll" });
  const details = make("details", {}, make("summary", {}, "The same as a table"), table);
  el.append(legendOf(story.about.looks), canvas, tip, buttons, details);
  const context = canvas.getContext("2d");

  // What is seen, in seconds; `follow` keeps the newest in sight.
  const seen = { from: 0, to: 1, follow: true, chosen: false, live: false };
  let byRow = [];
  let indexed = 0;
  let lengths = [];
  let patterns = null;
  let source = null;
  let epoch = -1;
  let focused = -1;

  const plot = () => ({
    width: Math.max(50, canvas.clientWidth - GUTTER - 6),
    row: Math.max(14, Math.min(26, Math.floor(360 / story.about.nodes.length))),
  });
  const xOf = (time) => GUTTER + ((time - seen.from) / (seen.to - seen.from)) * plot().width;
  const timeAt = (x) => seen.from + ((x - GUTTER) / plot().width) * (seen.to - seen.from);

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
      Object.assign(seen, { from: 0, to: 1, follow: true, chosen: false, live: false });
    }
    seen.live ||= !trace.complete;
    for (; indexed < bars.count; indexed += 1) {
      byRow[bars.row[indexed]].push(indexed);
      const length = bars.ended[indexed] - bars.began[indexed];
      if (bars.row[indexed] > 0 && length > 0) lengths.push(length);
    }
  };

  /** How long a piece is in which single runs can be told apart. */
  const readable = (trace) => {
    if (model.get("span") > 0) return model.get("span");
    if (!lengths.length) return Math.max(trace.now, 0.1);
    const sample = lengths.slice(-400).sort((a, b) => a - b);
    return Math.min(Math.max(trace.now, 1e-6), BARS_SEEN * sample[sample.length >> 1]);
  };

  const look = (trace, moment) => {
    const newest = Math.min(moment, trace.now);
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
    const ended = source.ended;
    let low = 0;
    let high = row.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ended[row[middle]] < time) low = middle + 1;
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
    const style = getComputedStyle(el);
    const ink = style.color;
    const line = style.getPropertyValue("--pipeinfer-line") || "#ddd";
    const font = style.fontFamily;
    context.font = `12px ${font}`;
    context.textBaseline = "middle";

    let drawn = 0;
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, width + 6, height);
    context.clip();
    for (const [row, entries] of byRow.entries()) {
      const y = TOP + row * high;
      context.strokeStyle = line;
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(GUTTER, y + high / 2);
      context.lineTo(GUTTER + width, y + high / 2);
      context.stroke();
      for (let at = firstBar(entries, seen.from); at < entries.length; at += 1) {
        const bar = entries[at];
        if (bars.began[bar] > seen.to || bars.began[bar] > moment) break;
        const x = xOf(bars.began[bar]);
        const barWidth = Math.max(1, xOf(Math.min(bars.ended[bar], moment)) - x);
        const work = bars.work[bar];
        paintBar(context, looks[works.look[work]], x, y + 2, barWidth, high - 4, patterns);
        drawn += 1;
        if (barWidth > 26 && works.text[work]) {
          paintLabel(works.text[work], looks[works.look[work]], x, y, barWidth, high);
        }
      }
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
    for (const [row, name] of nodes.entries()) context.fillText(name, 2, TOP + (row + 0.5) * high);
    context.fillText("text", 2, bottom + TEXT / 2);
    paintAxis(bottom + TEXT, width, ink);

    heading(trace);
    Object.assign(canvas, {
      ariaLabel:
        `Timeline: ${bars.count} bars of ${nodes.length} nodes, ${tokens.count} tokens of text, ` +
        `${waves.count} times runs were called off; the table below says the same. ` +
        `Plus and minus zoom, arrows move, 0 shows all, F follows.`,
    });
    Object.assign(el.dataset, {
      bars: bars.count,
      drawn,
      waves: waves.count,
      tokens: tokens.count,
      from: seen.from.toFixed(6),
      to: seen.to.toFixed(6),
      follow: seen.follow,
    });
    follower.setAttribute("aria-pressed", seen.follow);
    if (details.open) fillTable(trace);
  };

  const paintLabel = (text, { pattern }, x, y, width, high) => {
    context.save();
    context.beginPath();
    context.rect(x + 1, y, width - 2, high);
    context.clip();
    context.font = "12px monospace";
    context.textAlign = "left";
    const label = visible(text);
    const x0 = Math.max(x, GUTTER) + 4;
    const solid = pattern === "plain" || pattern === "underline";
    if (!solid && pattern !== "outline") {
      context.fillStyle = "#fff";
      context.fillRect(x0 - 2, y + 4, Math.min(width - 6, context.measureText(label).width + 4), high - 8);
    }
    context.fillStyle =
      solid ? "#fff" : pattern === "outline" ? getComputedStyle(el).color : "#222";
    context.fillText(label, x0, y + high / 2 + (pattern === "underline" ? -1 : 0.5));
    context.restore();
  };

  const paintWaves = (waves, moment, bottom) => {
    context.strokeStyle = "#d55e00";
    context.fillStyle = "#d55e00";
    context.lineWidth = 1;
    context.textAlign = "left";
    context.font = "10px sans-serif";
    context.setLineDash([3, 3]);
    let last = -Infinity;
    for (let at = upTo(waves.time, seen.from); at < waves.count; at += 1) {
      if (waves.time[at] > Math.min(seen.to, moment)) break;
      const x = xOf(waves.time[at]);
      context.beginPath();
      context.moveTo(x, TOP - 6);
      context.lineTo(x, bottom);
      context.stroke();
      if (x - last > 24) {
        context.fillText(`✕${waves.runs[at]}`, x + 5, 7);
        last = x;
      }
    }
    context.setLineDash([]);
  };

  const paintTokens = (tokens, moment, bottom, ink) => {
    context.font = "12px monospace";
    context.textAlign = "left";
    context.fillStyle = ink;
    let free = -Infinity;
    const first = upTo(tokens.time, seen.from - 1e-9);
    for (let at = first; at < tokens.count; ) {
      const time = tokens.time[at];
      if (time > Math.min(seen.to, moment)) break;
      const x = xOf(time);
      let text = "";
      for (; at < tokens.count && tokens.time[at] === time; at += 1) text += tokens.text[at];
      context.beginPath();
      context.moveTo(x, TOP - 3);
      context.lineTo(x - 3.5, TOP - 10);
      context.lineTo(x + 3.5, TOP - 10);
      context.fill();
      context.globalAlpha = 0.25;
      context.fillRect(x, bottom, 1, 4);
      context.globalAlpha = 1;
      if (x < free) continue;
      const next = at < tokens.count && tokens.time[at] <= seen.to ? xOf(tokens.time[at]) : GUTTER + plot().width;
      let label = visible(text);
      const room = next - x - 4;
      if (context.measureText(label).width > room) {
        const fits = Math.floor(room / context.measureText("m").width);
        label = fits >= 2 ? `${label.slice(0, fits - 1)}…` : "";
      }
      context.fillText(label, x + 2, bottom + TEXT / 2 + 1);
      free = x + context.measureText(label).width;
    }
  };

  const paintAxis = (y, width, ink) => {
    context.strokeStyle = ink;
    context.lineWidth = 1;
    context.textAlign = "center";
    context.beginPath();
    context.moveTo(GUTTER, y + 0.5);
    context.lineTo(GUTTER + width, y + 0.5);
    const marks = ticks(seen.from, seen.to, width / 90);
    for (const time of marks) {
      context.moveTo(xOf(time), y);
      context.lineTo(xOf(time), y + 4);
    }
    context.stroke();
    for (const time of marks) {
      const x = Math.min(Math.max(xOf(time), GUTTER + 14), GUTTER + width - 22);
      context.fillText(`${Number((1e3 * time).toPrecision(9))}`, x, y + 12);
    }
    context.textAlign = "left";
    context.fillText("ms", 2, y + 12);
  };

  const fillTable = (trace) => {
    const { works, bars } = trace.tables;
    const { nodes, looks } = trace.about;
    const counts = nodes.map(() => looks.map(() => 0));
    const busy = nodes.map(() => 0);
    for (let bar = 0; bar < bars.count; bar += 1) {
      counts[bars.row[bar]][works.look[bars.work[bar]]] += 1;
      busy[bars.row[bar]] += bars.ended[bar] - bars.began[bar];
    }
    const cells = (tag, texts) => make("tr", {}, ...texts.map((text) => make(tag, {}, text)));
    table.replaceChildren(
      make(
        "table",
        {},
        make("thead", {}, cells("th", ["node", ...looks.map((each) => each.meaning), "busy"])),
        make(
          "tbody",
          {},
          ...nodes.map((name, row) =>
            cells("td", [name, ...counts[row].map(String), `${Math.round((100 * busy[row]) / trace.now || 0)}%`]),
          ),
        ),
      ),
    );
  };

  // --- moving about ----------------------------------------------------------------

  const choose = (from, to, keep = false) => {
    const most = Math.max(story.now * 1.02, 1e-3);
    const span = Math.min(Math.max(to - from, 1e-5), most);
    seen.from = Math.max(0, Math.min(from, most - span));
    seen.to = seen.from + span;
    seen.chosen = true;
    seen.follow = keep && seen.follow;
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
  const all = () => choose(0, Math.max(story.now * 1.01, 1e-3));
  const toggle = () => {
    seen.chosen = true;
    seen.follow = !seen.follow;
    redraw();
  };
  const keys = {
    "+": () => zoom(0.5),
    "=": () => zoom(0.5),
    "-": () => zoom(2),
    ArrowLeft: () => pan(-0.2),
    ArrowRight: () => pan(0.2),
    Home: () => pan(-1e6),
    End: () => pan(1e6),
    0: all,
    f: toggle,
  };
  canvas.addEventListener("keydown", (event) => {
    const action = keys[event.key] ?? keys[event.key.toLowerCase()];
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

  const explain = (x, y) => {
    const { nodes, places, looks } = story.about;
    const entries = byRow[Math.floor((y - TOP) / plot().row)];
    const time = timeAt(x);
    const slack = 2 * ((seen.to - seen.from) / plot().width);
    focused = -1;
    if (entries && x > GUTTER) {
      const at = firstBar(entries, time - slack);
      if (at < entries.length && source.began[entries[at]] <= time + slack) focused = entries[at];
    }
    tip.hidden = focused < 0;
    el.dataset.focused = focused;
    if (focused < 0) return;
    const { works, bars } = story.tables;
    const work = bars.work[focused];
    const { name, meaning } = looks[works.look[work]];
    const what = name === "draft" ? "draft" : "run";
    const layers = bars.layers[focused];
    const place = places[bars.row[focused]];
    const lines = [`${nodes[bars.row[focused]]}, ${what} ${works.number[work]}: ${meaning}`];
    if (place) lines.push(place);
    if (works.text[work]) lines.push(`“${visible(works.text[work])}”`);
    if (name === "draft") {
      lines.push(`${works.size[work]} guesses in ${layers} passes of the draft model`);
    } else {
      lines.push(`${works.size[work]} tokens, ${works.kept[work]} of them text`);
      const spared = bars.spared[focused];
      lines.push(`${layers} layers computed${spared ? `, ${spared} saved by calling off` : ""}`);
    }
    const took = bars.ended[focused] - bars.began[focused];
    lines.push(`${ms(bars.began[focused])} to ${ms(bars.ended[focused])} (${ms(took, 2)})`);
    tip.textContent = lines.join("\n");
    tip.style.left = `${Math.min(x + 12, Math.max(0, canvas.clientWidth - 280))}px`;
    tip.style.top = `${canvas.offsetTop + y + 14}px`;
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
    make("span", { className: "pipeinfer-muted" }, "Drag to move. Click, then wheel or + − to zoom; ← → 0 F work, too."),
  );

  const { redraw, stop } = follow(model, el, story, draw);
  details.addEventListener("toggle", () => details.open && fillTable(story));
  const sizes = new ResizeObserver(redraw);
  sizes.observe(canvas);
  return () => {
    sizes.disconnect();
    stop();
  };
}

export default { render };
