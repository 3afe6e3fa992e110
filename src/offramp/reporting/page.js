(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const shown = Object.fromEntries(figures.map((figure) => [figure.id, 0]));
  const root = document.documentElement;
  const MANY = 6;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Colours are written as names of CSS variables, so that charts follow the page's light, dark and print colours.
  function coloured(value, key) {
    if (typeof value === "string" && value.startsWith("--") && /color$/.test(key)) {
      return getComputedStyle(root).getPropertyValue(value).trim();
    }
    if (Array.isArray(value)) return value.map((each) => coloured(each, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, coloured(each, name)]));
  }

  function layoutOf(choice, place) {
    const width = place.clientWidth;
    const own = choice.layout;
    const title = { standoff: 8, font: { size: 13 } };
    const axis = { gridcolor: "--rule", linecolor: "--rule", zeroline: false, automargin: true, title };
    const merged = (name) => ({ ...axis, ...own[name], title: { ...axis.title, ...(own[name] || {}).title } });
    const paper = root.classList.contains("printing") ? { width: place.closest(".gate") ? 330 : 680 } : {};
    return coloured({
      ...own,
      ...paper,
      xaxis: merged("xaxis"),
      yaxis: merged("yaxis"),
      font: { family: getComputedStyle(document.body).fontFamily, size: width < 500 ? 12 : 13, color: "--ink" },
      margin: { l: 8, r: width < 500 ? 8 : 20, t: 12, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      legend: legendOf(choice),
      hoverlabel: { bgcolor: "--card", bordercolor: "--static", font: { color: "--ink" }, align: "left" },
      dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    }, "");
  }

  // A few names stand above a chart. Many stand below it, and the chart grows by the lines that they need.
  function legendOf(choice) {
    if (named(choice).length <= MANY) return { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" };
    return { orientation: "h", x: 0, xanchor: "left", y: 0, yanchor: "bottom", yref: "container", tracegroupgap: 0 };
  }

  const named = (choice) => choice.data.filter((each) => each.name && each.showlegend !== false);

  function grow(choice, place) {
    const names = named(choice);
    if (names.length <= MANY) return;
    const widest = 58 + 7.5 * Math.max(...names.map((each) => each.name.length));
    const lines = Math.ceil(names.length / Math.max(1, Math.floor(place.clientWidth / widest)));
    place.style.height = "";
    place.style.height = `${place.clientHeight + 22 * lines}px`;
  }

  function draw(figure) {
    const place = document.getElementById(figure.id);
    const choice = figure.choices[shown[figure.id]];
    grow(choice, place);
    const options = { displayModeBar: false, responsive: true };
    return Plotly.react(place, coloured(choice.data, ""), layoutOf(choice, place), options);
  }

  const drawAll = () => Promise.all(figures.map(draw));

  for (const radio of document.querySelectorAll(".switch input")) {
    if (radio.checked) shown[radio.name] = Number(radio.value);
    radio.addEventListener("change", () => {
      shown[radio.name] = Number(radio.value);
      draw(figures.find((figure) => figure.id === radio.name));
    });
  }

  // On paper: light colours, the width of a page, and nothing folded away but the gates' figures.
  const folds = document.querySelectorAll("details:not(.gate details)");
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    for (const fold of folds) {
      fold.dataset.was = fold.open;
      fold.open = true;
    }
    drawAll();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    for (const fold of folds) fold.open = fold.dataset.was === "true";
    drawAll();
  });
  dark.addEventListener("change", drawAll);
  drawAll().then(() => { root.dataset.drawn = figures.length; });
})();
