"use strict";
// Read values off a chart: the nearest x under the pointer, and every line's y there.
for (const chart of document.querySelectorAll(".chart")) {
  const { series, limits, box } = JSON.parse(chart.dataset.readout);
  if (!series.length) continue;
  const drawing = chart.querySelector(".drawing"), cursor = chart.querySelector(".cursor"), output = chart.querySelector("output");
  const places = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
  chart.showAt = (x) => {
    const share = box[0] + (box[1] - box[0]) * (x - limits[0]) / (limits[1] - limits[0]);
    cursor.style.left = 100 * share + "%";
    cursor.hidden = false;
    output.replaceChildren(x + ": ");
    for (const s of series.filter((s) => s.x.includes(x))) {
      const value = document.createElement("span");
      value.className = s.ink;
      value.textContent = +s.y[s.x.indexOf(x)].toPrecision(3);
      output.append(output.childElementCount ? "  " : "", value);
    }
  };
  drawing.addEventListener("pointermove", (event) => {
    const area = drawing.getBoundingClientRect();
    const share = ((event.clientX - area.left) / area.width - box[0]) / (box[1] - box[0]);
    const x = limits[0] + share * (limits[1] - limits[0]);
    chart.showAt(places.reduce((best, p) => Math.abs(p - x) < Math.abs(best - x) ? p : best));
  });
  drawing.addEventListener("pointerleave", () => { cursor.hidden = true; output.textContent = ""; });
}
