// The book's whole script: theme, menu, copy buttons, search, folds, previews, and the place in the table of contents.
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

  // search: the index is loaded when it is first wanted; every word must occur if a section has them all, titles weigh more,
  // and a word that occurs nowhere counts as the nearest one that does
  var query = document.getElementById("query"), results = document.getElementById("results"), found = document.getElementById("found");
  var index = null, asked = false, vocabulary = null;
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
  // letters to insert, remove, change or swap to get from one word to the other, at most `most`
  function distance(a, b, most) {
    if (Math.abs(a.length - b.length) > most) return most + 1;
    var rows = [[]];
    for (var j = 0; j <= b.length; j++) rows[0].push(j);
    for (var i = 1; i <= a.length; i++) {
      rows.push([i]);
      for (j = 1; j <= b.length; j++) {
        var cost = a[i - 1] === b[j - 1] ? 0 : 1;
        rows[i][j] = Math.min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + cost);
        if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) rows[i][j] = Math.min(rows[i][j], rows[i - 2][j - 2] + 1);
      }
      if (Math.min.apply(null, rows[i]) > most) return most + 1;
    }
    return rows[a.length][b.length];
  }
  function count() {
    var seen = Object.create(null);
    index.forEach(function (entry) {
      (entry.head + " " + entry.body).split(/[^a-z0-9_]+/).forEach(function (word) { if (word.length > 3) seen[word] = (seen[word] || 0) + 1; });
    });
    return seen;
  }
  function occurs(word) { return index.some(function (entry) { return entry.head.indexOf(word) >= 0 || entry.body.indexOf(word) >= 0; }); }
  function meant(word) {
    if (word.length < 4 || occurs(word)) return word;
    vocabulary = vocabulary || count();
    var most = word.length < 7 ? 1 : 2, best = word, least = most + 1;
    Object.keys(vocabulary).forEach(function (other) {
      var far = distance(word, other, Math.min(most, least));
      if (far < least || (far === least && far <= most && vocabulary[other] > vocabulary[best])) { least = far; best = other; }
    });
    return best;
  }
  function marked(part, text, words) {
    var low = plain(text), at = 0;
    if (low.length !== text.length) { part.textContent = text; return; }
    while (at < text.length) {
      var next = -1, long = "";
      words.forEach(function (word) {
        var here = low.indexOf(word, at);
        if (here >= 0 && (next < 0 || here < next || (here === next && word.length > long.length))) { next = here; long = word; }
      });
      if (next < 0) break;
      part.appendChild(document.createTextNode(text.slice(at, next)));
      part.appendChild(document.createElement("mark")).textContent = text.slice(next, next + long.length);
      at = next + long.length;
    }
    part.appendChild(document.createTextNode(text.slice(at)));
  }
  function score(entry, words, any) {
    var total = entry.own.replace(/^[\d.]+ /, "") === words.join(" ") ? 60 : 0;
    for (var i = 0; i < words.length; i++) {
      var word = words[i], edge = new RegExp("(^|[^a-z0-9])" + word.replace(/[.*+?^$()|[\]{}\\]/g, "\\$&"));
      var body = entry.body.split(word).length - 1, value = Math.min(body, 5);
      if (edge.test(entry.body)) value += 2;
      if (entry.head.indexOf(word) >= 0) value += 8;
      if (edge.test(entry.own)) value += 20;
      if (!value && !any) return 0;
      total += value;
    }
    return total;
  }
  function ranked(words, any) {
    return index.map(function (entry) { return [score(entry, words, any), entry]; })
      .filter(function (hit) { return hit[0]; }).sort(function (a, b) { return b[0] - a[0]; }).slice(0, 12);
  }
  function excerpt(entry, words) {
    var first = Math.max.apply(null, words.map(function (word) { return entry.body.indexOf(word); }));
    var at = Math.max(0, first - 50), cut = entry.text.slice(at, at + 150);
    return (at ? "…" + cut.replace(/^\S*\s/, "") : cut) + (at + 150 < entry.text.length ? "…" : "");
  }
  function search() {
    if (!index) return;
    var words = plain(query.value).split(/\s+/).filter(Boolean);
    results.textContent = "";
    results.hidden = !words.length;
    found.textContent = "";
    if (!words.length) return;
    var typed = words.join(" ");
    words = words.map(meant);
    if (words.join(" ") !== typed) {
      var note = results.appendChild(document.createElement("li"));
      note.className = "note";
      note.textContent = "Nothing for “" + typed + "”; this is “" + words.join(" ") + "”";
    }
    var hits = ranked(words, false);
    if (!hits.length) hits = ranked(words, true);
    hits.forEach(function (hit) {
      var entry = hit[1], item = document.createElement("li"), link = document.createElement("a");
      var place = entry.url.split("#");
      link.href = up + place[0] + "?find=" + encodeURIComponent(words.join(" ")) + (place[1] ? "#" + place[1] : "");
      [["b", entry.section || entry.page], ["i", entry.section ? entry.page : ""], ["span", excerpt(entry, words)]].forEach(function (pair) {
        if (!pair[1]) return;
        var part = document.createElement(pair[0]);
        marked(part, pair[1], words);
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
    var inner = target && target.closest(".cell") === target && target.querySelector(":scope > details.fold");
    if (inner) inner.open = true;
    if (target) target.scrollIntoView();
  }
  addEventListener("hashchange", unfold);
  if (location.hash) unfold();

  // one switch for all folded code, remembered
  var folds = all("details.fold"), begun = folds.map(function (box) { return box.open; });
  function showAll(yes) {
    folds.forEach(function (box, at) { box.open = yes || begun[at]; });
    all("button.all").forEach(function (button) {
      button.setAttribute("aria-pressed", String(yes));
      button.textContent = yes ? "Hide folded code" : "Show all code";
    });
    try { localStorage.setItem("code", yes ? "all" : ""); } catch (none) {}
  }
  all("button.all").forEach(function (button) {
    button.hidden = !folds.length;
    button.addEventListener("click", function () { showAll(button.getAttribute("aria-pressed") !== "true"); });
  });
  try { if (folds.length && localStorage.getItem("code") === "all") { showAll(true); if (location.hash) unfold(); } } catch (none) {}

  // words that a search led here for are marked in the text
  var sought = /[?&]find=([^&#]*)/.exec(location.search);
  if (sought && window.CSS && CSS.highlights) {
    var ranges = [], seek = plain(decodeURIComponent(sought[1])).split(/\s+/).filter(Boolean);
    var walker = document.createTreeWalker(document.getElementById("main"), NodeFilter.SHOW_TEXT), node;
    while ((node = walker.nextNode())) {
      var low = plain(node.data);
      if (low.length === node.data.length) seek.forEach(function (word) {
        for (var at = low.indexOf(word); at >= 0; at = low.indexOf(word, at + word.length)) {
          var range = new Range();
          range.setStart(node, at);
          range.setEnd(node, at + word.length);
          ranges.push(range);
        }
      });
    }
    CSS.highlights.set("sought", new Highlight(...ranges));
  }

  // what a reference leads to, shown on hover and on focus; Escape or leaving hides it
  var shown = null, timer = null, known = null, wanted = [];
  function previews(then) {
    if (known) return then();
    wanted.push(then);
    if (wanted.length > 1) return;
    var script = document.createElement("script");
    script.src = up + "assets/previews.js";
    script.onload = function () { known = window.BOOK_PREVIEWS; wanted.forEach(function (one) { one(); }); };
    document.head.appendChild(script);
  }
  function hide() { clearTimeout(timer); if (shown) { shown.remove(); shown = null; } }
  function preview(link) {
    var name = decodeURIComponent(link.hash.slice(1)), top = new URL(up || "./", location.href).pathname;
    var html = name ? known[name] : known["page:" + link.pathname.slice(top.length)];
    hide();
    if (!html) return;
    shown = document.createElement("aside");
    shown.id = "preview";
    shown.setAttribute("role", "tooltip");
    shown.innerHTML = (link.dataset.title ? "<small></small>" : "") + html;
    if (link.dataset.title) shown.firstChild.textContent = link.dataset.title;
    link.setAttribute("aria-describedby", "preview");
    document.body.appendChild(shown);
    var at = link.getBoundingClientRect(), box = shown.getBoundingClientRect();
    var left = Math.max(8, Math.min(at.left, innerWidth - box.width - 16));
    var below = at.bottom + box.height + 8 < innerHeight || at.top < box.height + 8;
    shown.style.left = left + scrollX + "px";
    shown.style.top = scrollY + (below ? at.bottom + 6 : at.top - box.height - 6) + "px";
    shown.addEventListener("mouseenter", function () { clearTimeout(timer); });
    shown.addEventListener("mouseleave", hide);
  }
  all("main a.ref, main .citation a").forEach(function (link) {
    if (link.title) { link.dataset.title = link.title; link.removeAttribute("title"); }
    function soon() { clearTimeout(timer); timer = setTimeout(function () { previews(function () { preview(link); }); }, 150); }
    link.addEventListener("mouseenter", soon);
    link.addEventListener("focus", soon);
    link.addEventListener("blur", hide);
    link.addEventListener("mouseleave", function () { clearTimeout(timer); timer = setTimeout(function () { if (shown && !shown.matches(":hover")) hide(); }, 200); });
  });
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") hide(); });
})();
