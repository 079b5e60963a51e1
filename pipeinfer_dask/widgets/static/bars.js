// How bars look, and what their looks mean.

/** Paint a bar; patterns tell the fates apart besides the colours. */
function paintBar(context, look, x, y, width, height, patterns) {
  if (look.pattern === "outline") {
    context.globalAlpha *= 0.35;
    context.fillStyle = look.colour;
    context.fillRect(x, y, width, height);
    context.globalAlpha /= 0.35;
  } else {
    context.fillStyle = patterns[look.name] && width > 3 ? patterns[look.name] : look.colour;
    context.fillRect(x, y, width, height);
  }
  if (look.pattern === "underline" && width > 3) {
    context.fillStyle = "#fff"; // as the text's accepted tokens are
    context.fillRect(x + 1, y + height - 4, width - 2, 2);
  }
  if (width > 3) {
    context.strokeStyle = look.colour;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }
}

function makePatterns(context, looks) {
  const patterns = {};
  for (const look of looks) {
    if (!["dots", "stripes", "crosses"].includes(look.pattern)) continue;
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
    patterns[look.name] = context.createPattern(tile, "repeat");
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
    legend.append(make("span", { className: "pipeinfer-key" }, swatch, look.meaning));
  }
  legend.append(
    make("span", { className: "pipeinfer-key" }, "empty: idle"),
    make("span", { className: "pipeinfer-key" }, "▼ tokens become text"),
    make("span", { className: "pipeinfer-key" }, "┊ runs are called off"),
  );
  return legend;
}
