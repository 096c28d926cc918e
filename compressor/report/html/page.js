// Draws the figures with the style sheet's colours, again whenever those change.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const options = { displayModeBar: false, responsive: true, showTips: false };

  // A copy of plain data in which "var(--name)" is the value of that CSS property.
  const resolved = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
  };

  const draw = async () => {
    const style = getComputedStyle(root);
    const drawn = Object.entries(figures).map(([id, figure]) => {
      const { data, layout, height } = resolved(figure, style);
      const place = document.getElementById(id);
      place.style.height = `${height}px`;
      return Plotly.react(place, data, layout, options).then(Plotly.Plots.resize);
    });
    root.dataset.drawn = (await Promise.all(drawn)).length;
  };

  // Paper is white, whatever the screen is.
  const paper = (printing) => () => {
    root.classList.toggle("printing", printing);
    draw();
  };

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", paper(true));
  addEventListener("afterprint", paper(false));
  draw();
})();
