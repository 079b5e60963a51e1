// What a timeline shows besides its bars: their labels, waves, tokens and the axis.

const DIGIT = 6.5; // width of a figure of a run's number, in pixels

/** Return what paints them; `seen`, `plot` and `xOf` say where moments are. */
function marksFor(el, context, seen, plot, xOf) {
  /** Which run a bar is of, if its number has room; and behind it its text, as far as that has. */
  const paintLabel = (number, text, { pattern }, x, y, width, high, ink) => {
    const solid = pattern === "plain" || pattern === "underline";
    const bare = pattern === "outline" || pattern === "hollow";
    const from = Math.max(x, seen.gutter);
    const room = x + width - from;
    const taken = DIGIT * number.length;
    if (taken + 4 > room) return;
    const label = room - taken > 26 ? visible(text) : "";
    const edge = label && !solid && !bare ? 6 : 0; // the pattern is seen around a text, too
    const left = label ? from + 4 + edge : from + (room - taken) / 2;
    const behind = left + taken + (number ? 5 : 0);
    if (!number && !label) return;
    const middle = y + high / 2 + (pattern === "underline" ? -1 : 0.5);
    context.textAlign = "left";
    context.font = "12px monospace";
    if (!solid && !bare) {
      const wide = label ? behind - left + context.measureText(label).width : taken;
      context.fillStyle = "#fff";
      context.fillRect(left - 2, y + 4, Math.min(wide + 4, room - 2 - 2 * edge), high - 8);
    }
    context.fillStyle = solid ? "#fff" : bare ? ink : "#222";
    if (label) {
      context.save();
      context.beginPath();
      context.rect(behind, y, x + width - 3 - edge - behind, high);
      context.clip();
      context.fillText(label, behind, middle);
      context.restore();
    }
    context.font = "bold 11px sans-serif";
    context.fillText(number, left, middle);
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
      const next = at < tokens.count && tokens.time[at] <= seen.to ? xOf(tokens.time[at]) : seen.gutter + plot().width;
      let label = visible(text);
      const room = next - x - 4;
      if (context.measureText(label).width > room) {
        // Of what is too long its letters say most, not the spaces before them.
        const letters = visible(text.trim());
        const fits = Math.floor(room / context.measureText("m").width);
        label = letters.length <= fits ? letters : fits >= 2 ? `${letters.slice(0, fits - 1)}…` : "";
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
    context.moveTo(seen.gutter, y + 0.5);
    context.lineTo(seen.gutter + width, y + 0.5);
    const marks = ticks(seen.from, seen.to, width / 90);
    for (const time of marks) {
      context.moveTo(xOf(time), y);
      context.lineTo(xOf(time), y + 4);
    }
    context.stroke();
    for (const time of marks) {
      const x = Math.min(Math.max(xOf(time), seen.gutter + 14), seen.gutter + width - 22);
      context.fillText(`${Number((1e3 * time).toPrecision(9))}`, x, y + 12);
    }
    context.textAlign = "left";
    context.fillText("ms", 2, y + 12);
  };

  return { paintLabel, paintWaves, paintTokens, paintAxis };
}
