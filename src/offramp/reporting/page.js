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

  // plotly.js is in the page as gzip in base64, which makes the page three megabytes lighter.
  async function unpackPlotly() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  function draw(figure) {
    if (!window.Plotly) return null;  // not unpacked yet: everything is drawn right after that
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
  unpackPlotly().then(drawAll).then(
    () => { root.dataset.drawn = figures.length; },
    () => { document.getElementById("no-charts").hidden = false; },
  );

  // Every table can be kept as CSV: shares as numbers between 0 and 1, without separators of thousands.
  const plainNumber = (words) => {
    const number = words.replaceAll("\u2212", "-").replaceAll(",", "");
    if (/^[+-]?[\d.]+%$/.test(number)) return String(Number((Number(number.slice(0, -1)) / 100).toPrecision(12)));
    return /^[+-]?[\d.]+$/.test(number) ? number : words;
  };
  const cell = (element) => {
    const bold = element.querySelector("b");
    const words = plainNumber((bold || element).textContent.trim());
    return /[",\n]/.test(words) ? `"${words.replaceAll('"', '""')}"` : words;
  };
  for (const table of document.querySelectorAll("table")) {
    const caption = table.querySelector("caption");
    const link = document.createElement("a");
    const lines = [...table.rows].map((row) => [...row.cells].map(cell).join(","));
    link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(`${lines.join("\n")}\n`)}`;
    link.download = `${caption.textContent.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`;
    link.textContent = "CSV";
    link.className = "csv";
    caption.append(" ", link);
  }

  // A wide table says that it goes on to the side.
  for (const box of document.querySelectorAll(".scroll")) {
    const mark = () => box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    new ResizeObserver(() => requestAnimationFrame(mark)).observe(box);
  }
})();
