// The book's whole script: theme, menu, copy buttons, search, and the place in the table of contents.
(function () {
  "use strict";
  var root = document.documentElement, up = document.body.dataset.up;
  function all(selector) { return Array.prototype.slice.call(document.querySelectorAll(selector)); }

  // theme
  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  all("button.theme").forEach(function (button) {
    button.addEventListener("click", function () {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("theme", root.dataset.theme); } catch (none) {}
    });
  });

  // menu on narrow screens
  var menu = document.getElementById("menu"), sidebar = document.getElementById("sidebar");
  function open(yes) {
    sidebar.classList.toggle("open", yes);
    menu.setAttribute("aria-expanded", String(yes));
  }
  menu.addEventListener("click", function () { open(!sidebar.classList.contains("open")); });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape" && sidebar.classList.contains("open")) { open(false); menu.focus(); }
  });
  document.getElementById("main").addEventListener("click", function () { open(false); });
  var here = sidebar.querySelector("[aria-current]");
  if (here) sidebar.scrollTop = Math.max(0, here.offsetTop - sidebar.clientHeight / 2);

  // copy buttons
  all("div.code").forEach(function (box) {
    var button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", function () {
      copy(box.querySelector("code").textContent).then(function () {
        button.textContent = "Copied";
        setTimeout(function () { button.textContent = "Copy"; }, 1500);
      });
    });
    box.appendChild(button);
  });
  function copy(text) {
    if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
    var area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    document.body.appendChild(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    return Promise.resolve();
  }

  // search: the index is loaded when it is first wanted; every word must occur, titles weigh more
  var query = document.getElementById("query"), results = document.getElementById("results"), found = document.getElementById("found");
  var index = null, asked = false;
  function plain(text) { return text.toLowerCase().normalize("NFD").replace(/[\u0300-\u036f]/g, ""); }
  function load() {
    if (asked) return;
    asked = true;
    var script = document.createElement("script");
    script.src = up + "assets/search.js";
    script.onload = function () {
      index = window.BOOK_INDEX.map(function (entry) {
        return { url: entry[0], page: entry[1], section: entry[2], text: entry[3],
                 head: plain(entry[1] + " " + entry[2]), own: plain(entry[2] || entry[1]), body: plain(entry[3]) };
      });
      search();
    };
    document.head.appendChild(script);
  }
  function score(entry, words) {
    var total = 0;
    for (var i = 0; i < words.length; i++) {
      var word = words[i], edge = new RegExp("(^|[^a-z0-9])" + word.replace(/[.*+?^$()|[\]{}\\]/g, "\\$&"));
      var body = entry.body.split(word).length - 1, value = Math.min(body, 5);
      if (edge.test(entry.body)) value += 2;
      if (entry.head.indexOf(word) >= 0) value += 8;
      if (edge.test(entry.own)) value += 20;
      if (!value) return 0;
      total += value;
    }
    return total;
  }
  function excerpt(entry, words) {
    var at = Math.max(0, entry.body.indexOf(words[0]) - 50), cut = entry.text.slice(at, at + 150);
    return (at ? "…" + cut.replace(/^\S*\s/, "") : cut) + (at + 150 < entry.text.length ? "…" : "");
  }
  function search() {
    if (!index) return;
    var words = plain(query.value).split(/\s+/).filter(Boolean);
    results.textContent = "";
    results.hidden = !words.length;
    found.textContent = "";
    if (!words.length) return;
    var hits = index.map(function (entry) { return [score(entry, words), entry]; })
      .filter(function (hit) { return hit[0]; }).sort(function (a, b) { return b[0] - a[0]; }).slice(0, 12);
    hits.forEach(function (hit) {
      var entry = hit[1], item = document.createElement("li"), link = document.createElement("a");
      link.href = up + entry.url;
      [["b", entry.section || entry.page], ["i", entry.section ? entry.page : ""], ["span", excerpt(entry, words)]].forEach(function (pair) {
        if (!pair[1]) return;
        var part = document.createElement(pair[0]);
        part.textContent = pair[1];
        link.appendChild(part);
      });
      link.addEventListener("click", function () { results.hidden = true; open(false); });
      item.appendChild(link);
      results.appendChild(item);
    });
    found.textContent = hits.length ? hits.length + " results" : "Nothing found";
    if (!hits.length) results.appendChild(document.createElement("li")).textContent = "Nothing found";
  }
  query.addEventListener("focus", load);
  query.addEventListener("input", function () { load(); search(); });
  document.addEventListener("keydown", function (event) {
    var typing = /^(input|textarea|select)$/i.test(event.target.tagName) || event.target.isContentEditable;
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      open(true);
      query.focus();
    }
  });
  sidebar.addEventListener("keydown", function (event) {
    var links = all("#results a"), at = links.indexOf(document.activeElement);
    if (event.key === "Escape") { results.hidden = true; query.focus(); }
    if (results.hidden || !links.length || (at < 0 && document.activeElement !== query)) return;
    if (event.key === "ArrowDown") { event.preventDefault(); links[Math.min(at + 1, links.length - 1)].focus(); }
    if (event.key === "ArrowUp") { event.preventDefault(); if (at <= 0) query.focus(); else links[at - 1].focus(); }
    if (event.key === "Enter" && at < 0) { links[0].click(); }
  });

  // the table of contents follows the reader
  var marks = {};
  all("nav.contents a").forEach(function (link) { marks[decodeURIComponent(link.hash.slice(1))] = link; });
  var heads = all("main h2[id], main h3[id]").filter(function (head) { return marks[head.id]; });
  function follow() {
    var current = null;
    heads.forEach(function (head) { if (head.getBoundingClientRect().top < 120) current = head; });
    Object.keys(marks).forEach(function (id) { marks[id].classList.toggle("here", !!current && id === current.id); });
  }
  addEventListener("scroll", follow, { passive: true });
  follow();

  // whatever scrolls sideways can be reached with the keyboard
  function reach() {
    all("main pre, main p:has(math), main .formula, main .scroll, main .output.html").forEach(function (box) {
      var wide = box.scrollWidth > box.clientWidth + 1, tall = box.tagName !== "P" && box.scrollHeight > box.clientHeight + 1;
      if (wide || tall) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    });
  }
  addEventListener("load", reach);
  addEventListener("resize", reach);

  // a link to something inside a folded box opens the box
  function unfold() {
    var target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (var box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();
})();
