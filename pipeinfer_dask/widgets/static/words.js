// What a timeline says in words: of a bar, and of all of them as a table.

/** Return what says it; nothing tells more than is known at the moment that is shown. */
function tellersFor(model, story) {
  /** Which look a bar has at a moment: nothing tells what is decided later. */
  const lookAt = (bar, moment) => {
    const { looks } = story.about;
    const isOpen = story.tables.works.decided[story.tables.bars.work[bar]] > moment;
    return isOpen ? looks.findIndex((each) => each.name === "open") : story.tables.bars.look[bar];
  };

  /** What a bar says: what it is, its text, what was computed, how much of it, and when. */
  const words = (bar) => {
    const { nodes, places, looks } = story.about;
    const { works, bars } = story.tables;
    const work = bars.work[bar];
    const moment = momentOf(model);
    const { name, meaning } = looks[lookAt(bar, moment)];
    const [drafting, open] = [name === "draft", name === "open"];
    const spared = open ? 0 : bars.spared[bar];
    const lasts = bars.ended[bar] > moment;
    const ended = lasts ? moment : bars.ended[bar];
    return [
      `${nodes[bars.row[bar]]}, ${drafting ? "draft" : "run"} ${works.number[work]}: ${meaning}`,
      places?.[bars.row[bar]] ?? "",
      works.text[work] ? `“${visible(works.text[work])}”` : "",
      drafting ? `${works.size[work]} guesses` : `${works.size[work]} tokens${open ? "" : `, ${works.kept[work]} of them text`}`,
      lasts
        ? ""
        : drafting
          ? `${bars.layers[bar]} passes of the draft model`
          : `${bars.layers[bar]} layers computed${spared ? `, ${spared} saved by calling off` : ""}`,
      `${ms(bars.began[bar])} to ${ms(ended)} (${ms(ended - bars.began[bar], 2)}${lasts ? " so far" : ""})`,
    ];
  };

  /** How many bars of each look each node has had, and for how long it was busy. */
  const tableOfWork = (trace) => {
    const { bars } = trace.tables;
    const { nodes, looks } = trace.about;
    const counts = nodes.map(() => looks.map(() => 0));
    const busy = nodes.map(() => 0);
    const moment = momentOf(model);
    for (let bar = 0; bar < bars.count; bar += 1) {
      if (bars.began[bar] > moment) continue;
      counts[bars.row[bar]][lookAt(bar, moment)] += 1;
      busy[bars.row[bar]] += Math.min(bars.ended[bar], moment) - bars.began[bar];
    }
    const share = (row) => `${Math.round((100 * busy[row]) / Math.min(trace.now, moment) || 0)}%`;
    return tableOf(
      ["node", ...looks.map((each) => each.meaning), "busy"],
      nodes.map((name, row) => [name, ...counts[row].map(String), share(row)]),
    );
  };

  return { lookAt, words, tableOfWork };
}
