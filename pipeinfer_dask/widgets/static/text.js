// The text as it comes; what had been guessed instead can be shown struck through.

const CLASSES = { accepted: "pipeinfer-accepted", corrected: "pipeinfer-corrected", plain: "" };
const STRETCHES = 200; // that the table has at most

async function render({ model, el }) {
  const story = await Story.of(model);
  const heading = frameOf(el, model.get("label"));
  const box = make("div", { className: "pipeinfer-text", tabIndex: 0, role: "group", ariaLabel: "Generated text" });
  const shown = make("input", { type: "checkbox" });
  const key = make("div", { className: "pipeinfer-row pipeinfer-muted" });
  for (const { name, meaning } of story.about.origins) {
    key.append(make("span", { className: CLASSES[name] }, meaning));
  }
  key.append(make("label", {}, shown, " show rejected guesses, ", make("s", {}, "struck through")));
  const table = make("div", { className: "pipeinfer-scroll pipeinfer-words" });
  const details = make("details", {}, make("summary", {}, "The same as a table"), table);
  el.append(box, key, details);

  let source = null;
  let drawn = 0; // tokens that stand in the box
  let marked = false;
  let counts = []; // of the tokens in the box, by origin

  /** What was guessed and ruled out at the place of each token, up to it. */
  const rejected = (trace) => {
    const { guesses, settled } = trace.tables;
    const places = new Map();
    for (let row = 0; row < settled.count; row += 1) {
      const guess = settled.guess[row];
      if (settled.kept[row] || guesses.ahead[guess] === 0) continue;
      const position = guesses.position[guess];
      if (!places.has(position)) places.set(position, new Set());
      places.get(position).add(guesses.text[guess]);
    }
    return places;
  };

  /** A table of what stands in the box: a row for tokens in a row that came from the same place. */
  const stretches = (trace, count) => {
    const { tokens } = trace.tables;
    const places = rejected(trace);
    const rows = [];
    for (let at = 0; at < count; ) {
      const begin = at;
      let text = "";
      const out = [];
      for (; at < count && tokens.origin[at] === tokens.origin[begin]; at += 1) {
        text += tokens.text[at];
        out.push(...(places.get(tokens.position[at]) ?? []));
      }
      const numbers = at - begin > 1 ? `${begin + 1} to ${at}` : `${at}`;
      rows.push([numbers, visible(text), trace.about.origins[tokens.origin[begin]].meaning, out.map(visible).join(" | ")]);
    }
    const more = rows.length > STRETCHES ? `The last ${STRETCHES} of ${rows.length} rows.` : "";
    return [tableOf(["tokens", "text", "where it comes from", "guessed there, and ruled out"], rows.slice(-STRETCHES)), more];
  };

  const draw = (trace) => {
    const { tokens } = trace.tables;
    const count = upTo(tokens.time, momentOf(model));
    if (source !== tokens || count < drawn || shown.checked || marked) {
      box.replaceChildren();
      drawn = 0;
      counts = story.about.origins.map(() => 0);
      source = tokens;
    }
    marked = shown.checked;
    const places = marked ? rejected(trace) : new Map();
    const below = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    let struck = 0;
    for (; drawn < count; drawn += 1) {
      for (const text of places.get(tokens.position[drawn]) ?? []) {
        box.append(make("s", {}, visible(text)));
        struck += 1;
      }
      const { name, meaning } = trace.about.origins[tokens.origin[drawn]];
      counts[tokens.origin[drawn]] += 1;
      box.append(make("span", { className: CLASSES[name], title: meaning }, tokens.text[drawn]));
    }
    if (below) box.scrollTop = box.scrollHeight;
    const parts = trace.about.origins.map(({ meaning }, origin) => `${counts[origin]} ${meaning}`);
    box.setAttribute("aria-description", [`${count} tokens`, ...parts].join("; "));
    if (details.open) table.replaceChildren(...stretches(trace, count));
    heading(trace, ` · ${count} tokens`);
    Object.assign(el.dataset, { tokens: count, struck });
  };

  const { redraw, stop } = follow(model, el, story, draw);
  shown.addEventListener("change", redraw);
  details.addEventListener("toggle", redraw);
  return stop;
}

export default { render };
