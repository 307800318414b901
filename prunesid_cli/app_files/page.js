// The story of a square appears below its picture: by pointing, tapping, or the arrow keys.
(() => {
  const show = (cell) => {
    const svg = cell.closest("svg");
    svg.querySelectorAll(".ps-here, .ps-by").forEach((other) => other.classList.remove("ps-here", "ps-by"));
    cell.classList.add("ps-here");
    const around = (one) => `M${one.x.baseVal.value} ${one.y.baseVal.value}h1v1h-1z`;
    let path = around(cell);
    if (cell.dataset.by) {
      const by = svg.querySelector(`[data-i="${cell.dataset.by}"]`);
      by.classList.add("ps-by");
      const [x, y] = [cell, by].map((one) => [one.x.baseVal.value + 0.5, one.y.baseVal.value + 0.5]);
      path += `${around(by)}M${x}L${y}`;
    }
    svg.querySelectorAll(".ps-mark path").forEach((line) => line.setAttribute("d", path));
    svg.parentElement.querySelector(".ps-readout").textContent = cell.querySelector("title").textContent;
  };
  for (const kind of ["pointerover", "click"]) {
    document.addEventListener(kind, (event) => {
      const cell = event.target.closest?.("rect[data-i]");
      if (cell) show(cell);
    });
  }
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.("svg[data-columns]:focus-visible") && !event.target.querySelector(".ps-here")) {
      show(event.target.querySelector("rect[data-i]"));
    }
  });
  document.addEventListener("keydown", (event) => {
    const svg = event.target.closest?.("svg[data-columns]");
    const columns = svg && Number(svg.dataset.columns);
    const step = svg && { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step) return;
    event.preventDefault();
    const here = Number(svg.querySelector(".ps-here")?.dataset.i ?? 0);
    const crosses = Math.abs(step) === 1 && Math.floor(here / columns) !== Math.floor((here + step) / columns);
    const next = crosses ? null : svg.querySelector(`rect[data-i="${here + step}"]`);
    if (next) show(next);
  });
})();
