(function () {
  "use strict";
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function color(name) {
    return getComputedStyle(document.body).getPropertyValue("--" + name).trim() || name;
  }
  var names = ["ink", "muted", "accent", "good", "bad", "bar"];
  function themed(value) {
    if (Array.isArray(value)) { return value.map(themed); }
    if (value && typeof value === "object") {
      var out = {};
      Object.keys(value).forEach(function (key) {
        var inner = value[key];
        var isColor = key === "color" || key === "fillcolor";
        if (isColor && Array.isArray(inner)) { out[key] = inner.map(function (c) { return names.indexOf(c) < 0 ? c : color(c); }); }
        else { out[key] = isColor && names.indexOf(inner) >= 0 ? color(inner) : themed(inner); }
      });
      return out;
    }
    return value;
  }
  function lowest(data) {
    var low = 0;
    data.forEach(function (trace) { (trace.y || []).forEach(function (y) { if (typeof y === "number" && y < low) { low = y; } }); });
    return low;
  }
  function draw(name) {
    var element = document.getElementById("plot-" + name);
    var figure = JSON.parse(document.getElementById("data-" + name).textContent);
    var narrow = element.clientWidth < 520;
    var layout = themed(figure.layout);
    var axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), ticks: "", automargin: true };
    layout.xaxis = Object.assign({}, axis, layout.xaxis);
    layout.yaxis = layout.yaxis || {};
    Object.keys(layout).filter(function (key) { return /^yaxis/.test(key); }).forEach(function (key) {
      layout[key] = Object.assign({}, axis, layout[key]);
      if (layout[key].title) { layout[key].title.standoff = 12; }
    });
    (layout.shapes || []).forEach(function (shape) { if (shape.y0 === "bottom") { shape.y0 = lowest(figure.data) - Math.abs(shape.y1); } });
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, dragmode: false,
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: color("ink") },
      margin: { l: 20, r: narrow ? 16 : 40, t: 10, b: 48 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink") }, align: "left" }
    });
    if (name === "runtimes") { layout.margin.l = 10; layout.margin.r = 70; layout.bargap = 0.35; }
    Plotly.react(element, themed(figure.data), layout, { responsive: true, displayModeBar: false });
  }
  function all() {
    ["runtimes", "trials", "history", "sensitivity"].forEach(function (name) { if (document.getElementById("plot-" + name)) { draw(name); } });
  }
  function key(cell) {
    var value = cell.getAttribute("data-value");
    return value === null ? cell.textContent : value === "" ? null : Number(value);
  }
  function sort(table, column) {
    var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
    var up = heads[column].getAttribute("aria-sort") !== "ascending";
    var body = table.tBodies[0];
    var rows = Array.prototype.map.call(body.rows, function (row) { return { row: row, key: key(row.cells[column]) }; });
    rows.sort(function (a, b) {
      if (a.key === null || b.key === null) { return (a.key === null) - (b.key === null); }
      var order = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key);
      return up ? order : -order;
    });
    rows.forEach(function (one) { body.appendChild(one.row); });
    heads.forEach(function (head, i) { if (i === column) { head.setAttribute("aria-sort", up ? "ascending" : "descending"); } else { head.removeAttribute("aria-sort"); } });
  }
  Array.prototype.forEach.call(document.querySelectorAll("table.sortable"), function (table) {
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (head, column) {
      head.querySelector("button").addEventListener("click", function () { sort(table, column); });
    });
  });
  all();
  dark.addEventListener("change", all);
})();
