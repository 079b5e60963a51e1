// How bars look, and what their looks mean.

const RING = 3.5; // radius of the mark of what took no time, in pixels

/** Paint a bar, or a ring in its middle; patterns tell the fates apart besides the colours. */
function paintBar(context, look, x, y, width, height, patterns) {
  if (look.pattern === "ring") {
    context.beginPath();
    context.arc(x + width / 2, y + height / 2, RING, 0, 2 * Math.PI);
    context.fillStyle = "#fff";
    context.fill();
    context.strokeStyle = look.colour;
    context.lineWidth = 1.5;
    return context.stroke();
  }
  if (look.pattern === "hollow") {
    context.strokeStyle = look.colour;
    context.lineWidth = 1.5;
    context.setLineDash([3, 2]);
    if (width > 3) context.strokeRect(x + 1, y + 1, width - 2, height - 2);
    else {
      context.beginPath();
      context.moveTo(x + width / 2, y);
      context.lineTo(x + width / 2, y + height);
      context.stroke();
    }
    return context.setLineDash([]);
  }
  if (look.pattern === "outline") {
    context.globalAlpha *= 0.35;
    context.fillStyle = look.colour;
    context.fillRect(x, y, width, height);
    context.globalAlpha /= 0.35;
  } else {
    const kind = width > 3 ? patterns.wide : patterns.narrow;
    context.fillStyle = kind[look.name] ?? look.colour;
    context.fillRect(x, y, width, height);
  }
  if (look.pattern === "underline") {
    const edge = width > 3 ? 1 : 0;
    context.fillStyle = "#fff"; // as the text's accepted tokens are
    context.fillRect(x + edge, y + height - 4, width - 2 * edge, 2);
  }
  if (width > 3) {
    context.strokeStyle = look.colour;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }
}

/** Patterns for wide bars; for narrow ones bands, which can be told apart in a single column. */
function makePatterns(context, looks) {
  const bands = { dots: [3, 1], stripes: [2, 2], crosses: [1, 3] }; // heights of colour, and of white
  const patterns = { wide: {}, narrow: {} };
  for (const look of looks) {
    if (!(look.pattern in bands)) continue;
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const paint = tile.getContext("2d");
    paint.fillStyle = look.pattern === "crosses" ? "#fff" : look.colour;
    paint.fillRect(0, 0, 6, 6);
    paint.strokeStyle = look.pattern === "crosses" ? look.colour : "#fff";
    paint.beginPath();
    if (look.pattern === "dots") paint.rect(2, 2, 1, 1);
    else {
      for (const shift of [-6, 0, 6]) paint.moveTo(shift, 6), paint.lineTo(shift + 6, 0);
      if (look.pattern === "crosses") paint.moveTo(0, 0), paint.lineTo(6, 6);
    }
    paint.stroke();
    patterns.wide[look.name] = context.createPattern(tile, "repeat");
    const [coloured, white] = bands[look.pattern];
    const band = document.createElement("canvas");
    Object.assign(band, { width: 1, height: coloured + white });
    const fill = band.getContext("2d");
    fill.fillStyle = look.colour;
    fill.fillRect(0, 0, 1, coloured);
    fill.fillStyle = "#fff";
    fill.fillRect(0, coloured, 1, white);
    patterns.narrow[look.name] = context.createPattern(band, "repeat");
  }
  return patterns;
}

function legendOf(looks) {
  const legend = make("div", { className: "pipeinfer-row" });
  legend.append(make("span", { className: "pipeinfer-key pipeinfer-muted" }, "a row: a node; a bar: tokens it worked on"));
  for (const look of looks) {
    const swatch = make("canvas", { width: 40, height: 24, ariaHidden: "true" });
    const context = swatch.getContext("2d");
    context.scale(2, 2);
    paintBar(context, look, 0, 1, 20, 10, makePatterns(context, looks));
    legend.append(make("span", { className: "pipeinfer-key" }, swatch, look.legend));
  }
  legend.append(
    make("span", { className: "pipeinfer-key" }, "empty: idle"),
    make("span", { className: "pipeinfer-key" }, "▼ tokens become text"),
    make("span", { className: "pipeinfer-key" }, "┊ runs are called off"),
    make("span", { className: "pipeinfer-key" }, make("span", {}, make("b", {}, "a number"), ": which run; behind it, its text")),
  );
  return legend;
}
