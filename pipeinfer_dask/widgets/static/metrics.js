// The figures, and how they came about.

const CHART = { width: 300, height: 120, left: 38, bottom: 22, top: 8, right: 18 };
const MOMENTS = 12; // of the course of time that the table has

/** A chart's frame with an axis for the values; returns the SVG and where values lie. */
function chart(title, most, unit) {
  const { width, height, left, bottom, top } = CHART;
  const svg = makeSvg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": title });
  const y = (value) => height - bottom - (Math.min(value, most) / most) * (height - bottom - top);
  for (const value of ticks(0, most, 3)) {
    svg.append(
      makeSvg("path", { d: `M${left} ${y(value)}H${width}`, stroke: "var(--pipeinfer-line)" }),
      makeSvg("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, `${Number(value.toPrecision(3))}${unit}`),
    );
  }
  return { svg, y };
}

function lines(title, times, values, unit, end) {
  const { width, left, right, height } = CHART;
  const finite = values.filter((value) => Number.isFinite(value));
  const { svg, y } = chart(title, Math.max(...finite.slice(-2000), 1e-9) * 1.05, unit);
  const x = (time) => left + (time / (end || 1)) * (width - left - right);
  const step = Math.max(1, Math.floor(times.length / 300));
  const points = [];
  for (let row = 0; row < times.length; row += step) {
    if (Number.isFinite(values[row])) points.push(`${x(times[row]).toFixed(1)} ${y(values[row]).toFixed(1)}`);
  }
  if (points.length) {
    svg.append(makeSvg("path", { d: `M${points.join("L")}`, fill: "none", stroke: "#0072b2", "stroke-width": 2 }));
  }
  for (const time of ticks(0, end || 1, 4)) {
    svg.append(makeSvg("text", { x: x(time), y: height - 6, "text-anchor": "middle" }, `${Number((1e3 * time).toPrecision(6))}`));
  }
  if (finite.length) {
    svg.setAttribute("aria-label", `${title}: ${finite[finite.length - 1].toPrecision(3)}${unit} at last`);
  }
  return make("div", { className: "pipeinfer-chart" }, make("div", { className: "pipeinfer-muted" }, `${title} (across: ms)`), svg);
}

function columns(title, names, shares, notes) {
  const { width, left, height, bottom } = CHART;
  const { svg, y } = chart(`${title}: ${names.map((name, at) => `${name}: ${notes[at]}`).join(", ")}`, 1, "");
  const wide = (width - left) / Math.max(1, names.length);
  for (const [at, name] of names.entries()) {
    const x = left + at * wide;
    const bar = makeSvg("rect", {
      x: x + 0.12 * wide, width: 0.76 * wide, y: y(shares[at]), height: Math.max(0, height - bottom - y(shares[at])),
      fill: "#009e73",
    });
    bar.append(makeSvg("title", {}, notes[at]));
    svg.append(bar);
    if (wide > 14 || at % Math.ceil(14 / wide) === 0) {
      svg.append(makeSvg("text", { x: x + wide / 2, y: height - 6, "text-anchor": "middle" }, name));
    }
  }
  return make("div", { className: "pipeinfer-chart" }, make("div", { className: "pipeinfer-muted" }, title), svg);
}

async function render({ model, el }) {
  const story = await Story.of(model);
  const heading = frameOf(el, model.get("label"));
  const cards = make("div", { className: "pipeinfer-cards" });
  const charts = make("div", { className: "pipeinfer-charts" });
  const table = make("div", { className: "pipeinfer-scroll" });
  const details = make("details", {}, make("summary", {}, "The same as tables"), table);
  el.append(cards, charts, details);

  /** Of the guesses at each distance ahead of the text that are settled: how many became text. */
  const byDepth = (trace, moment) => {
    const { guesses, settled } = trace.tables;
    const depths = [];
    for (let row = upTo(settled.time, moment) - 1; row >= 0; row -= 1) {
      const guess = settled.guess[row];
      const ahead = guesses.ahead[guess];
      if (!ahead) continue;
      depths[ahead - 1] ??= { all: 0, kept: 0 };
      depths[ahead - 1].all += 1;
      depths[ahead - 1].kept += settled.kept[row];
    }
    return Array.from(depths, (depth) => depth ?? { all: 0, kept: 0 }).slice(0, 24);
  };

  const draw = (trace) => {
    const { figures, busy, tokens } = trace.tables;
    const { nodes } = trace.about;
    const moment = momentOf(model);
    const count = upTo(figures.time, moment);
    const end = count ? figures.time[count - 1] : 0;
    const last = (name) => (count ? figures[name][count - 1] : 0);
    const share = (part, whole) => (whole ? part / whole : NaN);
    const generated = upTo(tokens.time, moment);
    const speed = share(last("tokens"), end);
    const first = tokens.count && generated ? tokens.time[0] : NaN;
    const between = generated > 1 ? (tokens.time[generated - 1] - first) / (generated - 1) : NaN;
    const accepted = share(last("accepted"), last("drafted"));
    const vain = share(last("wasted"), last("computed"));
    const figure = (value, form) => (Number.isFinite(value) ? form(value) : "–");
    const percent = (value) => `${Math.round(100 * value)}%`;
    const values = [
      ["tokens a second", figure(speed, (value) => value.toFixed(1))],
      ["to the first token", figure(first, (value) => ms(value, 0))],
      ["between tokens", figure(between, (value) => ms(value))],
      ["guesses accepted", figure(accepted, percent)],
      ["computed in vain", figure(vain, percent)],
    ];
    cards.replaceChildren(
      ...values.map(([name, text]) => make("div", { className: "pipeinfer-card" }, make("b", {}, text), name)),
    );
    const upToNow = (column) => column.slice(0, count);
    const times = upToNow(figures.time);
    const at = upTo(tokens.time, moment);
    const gaps = [];
    for (let row = 1; row < at; row += 1) gaps.push(1e3 * (tokens.time[row] - tokens.time[row - 1]));
    const depths = byDepth(trace, moment);
    const shares = nodes.map((_, row) =>
      count ? Math.min(1, busy.seconds[(count - 1) * nodes.length + row] / (end || 1)) : 0,
    );
    charts.replaceChildren(
      lines("Tokens a second so far", times, upToNow(figures.tokens).map((each, row) => each / times[row]), "", end),
      lines("Time between tokens, ms", tokens.time.slice(1, at), gaps, "", end),
      lines("Guesses accepted so far, %", times, times.map((_, row) => 100 * share(figures.accepted[row], figures.drafted[row])), "", end),
      columns(
        "Guesses that became text, by places ahead", depths.map((_, depth) => `${depth + 1}`),
        depths.map(({ all, kept }) => share(kept, all) || 0), depths.map(({ all, kept }) => `${kept} of ${all}`),
      ),
      columns(
        "Share of the time that each node worked", nodes.map((_, row) => (row ? `${row - 1}` : "drafter")),
        shares, shares.map(percent),
      ),
    );
    if (details.open) {
      const some = Math.max(1, Math.ceil(count / MOMENTS));
      const rows = Array.from({ length: Math.ceil(count / some) }, (_, row) => count - 1 - row * some).reverse();
      table.replaceChildren(
        tableOf(["figure", "value"], values),
        tableOf(
          ["until", "tokens", "tokens a second so far", "guesses accepted so far"],
          rows.map((row) => [
            ms(times[row]), `${figures.tokens[row]}`, figure(share(figures.tokens[row], times[row]), (value) => value.toFixed(1)),
            figure(share(figures.accepted[row], figures.drafted[row]), percent),
          ]),
        ),
        tableOf(["places ahead", "guesses that became text"], depths.map(({ all, kept }, depth) => [`${depth + 1}`, `${kept} of ${all}`])),
        tableOf(["node", "share of the time that it worked"], nodes.map((name, row) => [name, percent(shares[row])])),
      );
    }
    heading(trace);
    Object.assign(el.dataset, {
      tokens: generated,
      speed: figure(speed, (value) => value.toFixed(3)),
      accepted: figure(accepted, (value) => value.toFixed(4)),
      wasted: last("wasted"),
    });
  };

  const { redraw, stop } = follow(model, el, story, draw, 250);
  details.addEventListener("toggle", redraw);
  return stop;
}

export default { render };
