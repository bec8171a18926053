(function () {
  "use strict";
  var roles = ["in", "affine", "out", "passes"];
  var words = { "in": "reads", affine: "per unit", out: "issues", passes: "through", block: "block" };
  var all = function (selector) { return Array.prototype.slice.call(document.querySelectorAll(selector)); };
  var net = document.getElementById("net"), pane = document.getElementById("pane");
  var map = document.getElementById("map"), seen = document.getElementById("seen"), said = document.getElementById("said");
  var ops = all(".op"), lines = all(".line"), ticks = all("[data-tick]"), brackets = all(".bracket"), rows = all("tr[data-group], tr[data-block]");
  var buttons = all("button[data-group], button[data-block]");
  var hint = said.textContent, held = null, shown = null;

  function key(element) {
    if (element.dataset.group !== undefined) { return "group " + element.dataset.group; }
    return element.dataset.block !== undefined ? "block " + element.dataset.block : null;
  }
  function numbers(op, role) { return (op.getAttribute("data-" + role) || "").split(" ").filter(Boolean); }
  function groupsOf(op) {
    var found = [];
    ["out", "affine", "in", "passes"].forEach(function (role) {
      numbers(op, role).forEach(function (n) { if (found.indexOf("group " + n) < 0) { found.push("group " + n); } });
    });
    return found;
  }
  function show(what) {
    shown = what;
    var kind = what && what.split(" ")[0], number = what && what.split(" ")[1];
    if (net) { net.classList.toggle("dimmed", Boolean(what)); }
    ops.forEach(function (op, i) {
      var own = (kind === "group" ? roles : kind === "block" ? ["block"] : []).filter(function (role) { return numbers(op, role).indexOf(number) >= 0; });
      roles.concat("block").forEach(function (role) { op.classList.toggle("is-" + role, own.indexOf(role) >= 0); });
      op.classList.toggle("lit", own.length > 0);
      op.querySelector(".tag").textContent = own.map(function (role) { return words[role]; }).join(" · ");
      ticks[i].classList.toggle("lit", own.length > 0);
    });
    lines.forEach(function (line) {
      var from = ops[line.dataset.from], to = ops[line.dataset.to];
      var gives = ["out", "affine", "passes", "block"].some(function (role) { return from.classList.contains("is-" + role); });
      line.classList.toggle("lit", gives && to.classList.contains("lit"));
      if (line.classList.contains("lit")) { line.parentNode.appendChild(line); }
    });
    brackets.concat(rows).forEach(function (element) { element.classList.toggle("lit", key(element) === what); });
    var button = buttons.filter(function (b) { return key(b) === what; })[0];
    said.textContent = button ? button.dataset.said : hint;
  }
  function hold(what) {
    held = what;
    buttons.forEach(function (button) { button.setAttribute("aria-pressed", String(key(button) === held)); });
    show(held);
  }
  function reveal() {
    var lit = ops.filter(function (op) { return op.classList.contains("lit"); });
    if (!lit.length) { return; }
    var frame = pane.getBoundingClientRect();
    var inside = lit.some(function (op) {
      var at = op.querySelector(".box").getBoundingClientRect();
      return at.top >= frame.top && at.bottom <= frame.bottom && at.left >= frame.left - 1 && at.right <= frame.right + 1;
    });
    if (inside) { return; }
    var first = lit[0].querySelector(".box").getBoundingClientRect();
    pane.scrollTop += first.top - frame.top - frame.height / 4;
    pane.scrollLeft += first.left + first.width / 2 - frame.left - frame.width / 2;
  }
  function back() { if (shown !== held) { show(held); } }

  rows.forEach(function (row) {
    row.addEventListener("mouseenter", function () { show(key(row)); reveal(); });
    row.addEventListener("mouseleave", back);
  });
  buttons.concat(brackets).forEach(function (element) {
    element.addEventListener("focus", function () { show(key(element)); reveal(); });
    element.addEventListener("blur", back);
    element.addEventListener("click", function () { hold(held === key(element) ? null : key(element)); reveal(); });
  });
  brackets.forEach(function (bracket) {
    bracket.addEventListener("mouseenter", function () { show(key(bracket)); });
    bracket.addEventListener("mouseleave", back);
  });
  ops.forEach(function (op) {
    var groups = groupsOf(op);
    function first() { return groups.indexOf(held) >= 0 ? held : groups[0]; }
    if (!groups.length) { return; }
    op.addEventListener("mouseenter", function () { show(first()); });
    op.addEventListener("mouseleave", back);
    op.addEventListener("focus", function () { show(first()); });
    op.addEventListener("blur", back);
    op.addEventListener("click", function () { hold(held === null || groups.indexOf(held) < 0 ? groups[0] : groups[groups.indexOf(held) + 1] || null); });
  });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") { hold(null); }
    var element = document.activeElement;
    if ((event.key === "Enter" || event.key === " ") && element && net && net.contains(element)) {
      event.preventDefault();
      element.dispatchEvent(new MouseEvent("click", { bubbles: false }));
    }
  });

  if (net) {
    var frame = net.viewBox.baseVal;
    var follow = function () {
      var scale = frame.height / net.clientHeight;
      seen.setAttribute("y", frame.y + pane.scrollTop * scale);
      seen.setAttribute("height", pane.clientHeight * scale);
      map.classList.toggle("idle", pane.clientHeight >= pane.scrollHeight);
    };
    var jump = function (event) {
      var at = map.getBoundingClientRect();
      pane.scrollTop = (event.clientY - at.top) / at.height * pane.scrollHeight - pane.clientHeight / 2;
    };
    pane.addEventListener("scroll", follow);
    window.addEventListener("resize", follow);
    map.addEventListener("pointerdown", function (event) { map.setPointerCapture(event.pointerId); jump(event); });
    map.addEventListener("pointermove", function (event) { if (event.buttons) { jump(event); } });
    pane.scrollLeft = (pane.scrollWidth - pane.clientWidth) / 2;
    follow();
  }
})();
