// A clock for several views.

function render({ model, el }) {
  el.classList.add("pipeinfer", "pipeinfer-clock");
  const { row, stop } = clockOf(model);
  el.append(row);
  const shown = hidePicture(model);
  return () => {
    stop();
    shown();
  };
}

export default { render };
