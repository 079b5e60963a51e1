// Moments of what is over: play, pause, step and scrub.

/** Return {row, stop}: buttons and a slider for a model's moment; a view that is alone has them once it is over. */
function clockOf(model) {
  const range = make("input", {
    type: "range", min: 0, step: "any", ariaLabel: "Moment", style: { flex: "1 1 200px" }, dataset: OWN_KEYS,
  });
  const label = make("span", { style: { minWidth: "11em", fontVariantNumeric: "tabular-nums" } });
  const button = (text, title) => make("button", { type: "button", title, ariaLabel: title }, text);
  const start = button("|◀", "To the start");
  const back = button("◀", "A step back");
  const play = button("play", "Play or pause");
  const ahead = button("▶", "A step ahead");
  const end = button("▶|", "To the end");
  const speed = make("select", { ariaLabel: "Speed" });
  for (const factor of model.get("speeds")) {
    speed.append(make("option", { value: factor }, factor === 1 ? "as it was" : `${1 / factor} times slower`));
  }
  const row = make("div", { className: "pipeinfer-row" }, start, back, play, ahead, end, range, label, speed);
  let frame = 0;
  let before = 0;

  /** The moment that is seen: of what is over, the newest is the last. */
  const now = () => (model.get("moment") < 0 ? model.get("last") : model.get("moment"));
  const draw = () => {
    const last = model.get("last");
    const moment = now();
    row.hidden = model.get("alone") && !last;
    for (const control of [start, back, play, ahead, end, range, speed]) control.disabled = !last;
    range.max = last;
    range.value = moment;
    label.textContent = last ? `${ms(moment)} of ${ms(last)}` : "steps once it is over";
    range.setAttribute("aria-valuetext", label.textContent);
    play.textContent = frame ? "pause" : "play";
    play.setAttribute("aria-pressed", Boolean(frame));
    speed.value = String(model.get("speed"));
    Object.assign(row.dataset, { moment: moment.toFixed(6), playing: Boolean(frame), steps: model.get("steps").length });
  };
  const go = (moment) => {
    model.set("moment", Math.min(Math.max(0, moment), model.get("last")));
    model.save_changes();
  };
  const pause = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    draw();
  };
  const tick = (time) => {
    const moment = now() + ((time - before) / 1e3) * model.get("speed");
    before = time;
    frame = requestAnimationFrame(tick);
    go(moment);
    if (moment >= model.get("last")) pause();
  };
  const toggle = () => {
    if (frame) return pause();
    if (now() >= model.get("last")) go(0);
    before = performance.now();
    frame = requestAnimationFrame(tick);
    return draw();
  };
  /** The neighbouring step: something was committed, started or called off there. */
  const step = (direction) => {
    pause();
    const steps = model.get("steps");
    const moment = now();
    const slack = 1e-6;
    const found = direction > 0 ? steps.find((time) => time > moment + slack) : steps.findLast((time) => time < moment - slack);
    go(found ?? (direction > 0 ? model.get("last") : 0));
  };
  const toStart = () => (pause(), go(0));
  const toEnd = () => (pause(), go(model.get("last")));
  const [earlier, later] = [() => step(-1), () => step(1)];
  // A slider without fixed steps has no keys of its own in every browser.
  const keys = {
    ArrowLeft: earlier, ArrowDown: earlier, ArrowRight: later, ArrowUp: later, Home: toStart, End: toEnd, " ": toggle,
  };
  range.addEventListener("keydown", (event) => {
    const action = keys[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
  start.addEventListener("click", toStart);
  end.addEventListener("click", toEnd);
  back.addEventListener("click", earlier);
  ahead.addEventListener("click", later);
  play.addEventListener("click", toggle);
  range.addEventListener("input", () => (pause(), go(Number(range.value))));
  speed.addEventListener("change", () => {
    model.set("speed", Number(speed.value));
    model.save_changes();
  });
  model.on("change", draw);
  draw();
  const stop = () => {
    model.off("change", draw);
    cancelAnimationFrame(frame);
  };
  return { row, stop };
}
