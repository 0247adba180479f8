// The script of a run's page: pages through completions and steps, reads out charts, and, while the
// run goes on, loads the page again. Texts of models and data only ever become text nodes.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const column = new Map(data.columns.map((name, i) => [name, i]));
  const value = (row, name) => (column.has(name) ? row[column.get(name)] : null) ?? null;
  const PAGE = 20, LONG = 1500;

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, v] of Object.entries(attributes || {})) {
      if (v === true) node.setAttribute(name, "");
      else if (v !== false && v !== null && v !== undefined) node.setAttribute(name, v);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function show(number) {
    if (number === null || number === undefined) return "";
    if (typeof number !== "number") return String(number);
    const size = Math.abs(number);
    if (Number.isInteger(number)) return number.toLocaleString("en");
    if (size >= 1000) return Math.round(number).toLocaleString("en");
    return size && size < 1e-3 ? number.toExponential(1) : number.toPrecision(3);
  }

  // Characters that are not there to see, or that reorder what is: shown by their code.
  const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]/u;

  function said(text, words, className) {
    const node = el("div", { class: "said " + className, dir: "auto" });
    marked(node, text, words);
    if (!text) node.append(el("span", { class: "note" }, "(empty)"));
    return node;
  }

  function marked(node, text, words) {
    const lower = words ? text.toLowerCase() : "";
    const same = lower.length === text.length; // else places in one are not those in the other
    let at = 0;
    while (words && same) {
      const next = lower.indexOf(words, at);
      if (next < 0) break;
      plain(node, text.slice(at, next));
      plain(node.appendChild(el("mark")), text.slice(next, next + words.length));
      at = next + words.length;
    }
    plain(node, text.slice(at));
  }

  function plain(node, text) {
    let rest = text, match;
    while ((match = UNSEEN.exec(rest))) {
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(rest.slice(0, match.index), el("bdi", { class: "code" }, "U+" + code));
      rest = rest.slice(match.index + match[0].length);
    }
    node.append(rest);
  }

  // ---------------------------------------------------------------- the reader's place

  const key = "trpo_lm:" + location.pathname;
  let place = { q: "", u: "", o: "newest", k: "all", s: "", t: "all", r: "" };

  function remembered() {
    try {
      return JSON.parse(sessionStorage.getItem(key)) || {};
    } catch {
      return {};
    }
  }

  const memory = remembered();
  Object.assign(place, memory.place);
  if (location.hash.includes("=")) {
    for (const [name, v] of new URLSearchParams(location.hash.slice(1))) {
      if (name in place) place[name] = v;
    }
  }

  function keep(scroll) {
    const hash = new URLSearchParams();
    const start = { q: "", u: "", o: "newest", k: "all", s: "", t: "all", r: "" };
    for (const name in place) if (place[name] !== start[name]) hash.set(name, place[name]);
    const text = hash.toString();
    if (text || location.hash.includes("=")) {
      history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
    }
    const now = { ...memory, place };
    if (scroll) {
      const all = [...document.querySelectorAll("header, main > section")];
      const above = all.filter((s) => s.getBoundingClientRect().top <= 1).pop() || all[0];
      const focused = document.activeElement;
      Object.assign(now, {
        again: true,
        section: all.indexOf(above),
        below: above.getBoundingClientRect().top,
        open: [...document.querySelectorAll("details[open]")].map((d) => d.id),
        focus: focused ? focused.id : "",
        caret: focused && focused.id === "query" ? focused.selectionStart : null,
      });
    } else {
      delete now.again;
    }
    try {
      sessionStorage.setItem(key, JSON.stringify(now));
    } catch {
      // the hash alone remembers
    }
  }

  // ---------------------------------------------------------------- a list in pages

  // Draws `PAGE` of `items` from the one whose key is `from`; buttons move by a page. Where a list
  // grows at its front, a page goes on beginning with the same item.
  function pages(pager, items, from, keyOf, draw, moved) {
    let start = from === "" ? 0 : items.findIndex((item) => keyOf(item) === from);
    if (start < 0) {
      const update = from.split(".")[0];
      start = Math.max(0, items.findIndex((item) => keyOf(item).split(".")[0] === update));
    }
    draw(items.slice(start, start + PAGE));
    const go = (to, name) => {
      const at = Math.max(0, Math.min(to, items.length - 1));
      moved(at === 0 ? "" : keyOf(items[at]));
      const again = byId(pager.id + "-" + name);
      if (again) (again.disabled ? byId(pager.id + "-first") : again).focus({ preventScroll: true });
    };
    const last = Math.max(0, Math.floor((items.length - 1) / PAGE) * PAGE);
    const button = (name, text, to, off) => {
      const node = el("button", { type: "button", id: pager.id + "-" + name, disabled: off }, text);
      node.addEventListener("click", () => go(to, name));
      return node;
    };
    const end = Math.min(start + PAGE, items.length);
    const first = start === 0, done = end >= items.length;
    pager.replaceChildren();
    if (items.length > PAGE) {
      pager.append(
        button("first", "First", 0, first), button("previous", "Previous", start - PAGE, first),
        button("next", "Next", start + PAGE, done), button("last", "Last", last, done),
        el("span", {}, `${(start + 1).toLocaleString("en")} to ${end.toLocaleString("en")} of ` +
          items.length.toLocaleString("en")),
      );
    }
  }

  // ---------------------------------------------------------------- completions

  const [PROMPT, OFFSET, UPDATE, TEXT, SCORE, REWARDS, REFERENCE, BEFORE, OF] = [...Array(9).keys()];
  const spoken = (x) => (typeof x === "string" ? x : x.map((turn) => turn.slice(1).join("\n")).join("\n"));
  let haystack = null;

  function searched() {
    haystack ||= data.completions.map((c) =>
      [spoken(data.prompts[c[PROMPT]]), spoken(c[TEXT]), c[REFERENCE] ? spoken(c[REFERENCE]) : ""]
        .join("\n").toLowerCase());
    return haystack;
  }

  const byScore = (sign) => (a, b) =>
    (a[SCORE] === null) - (b[SCORE] === null) || sign * (a[SCORE] - b[SCORE]);
  const newest = (a, b) => b[UPDATE] - a[UPDATE] || Math.abs(a[OFFSET]) - Math.abs(b[OFFSET]);
  const ORDERS = {
    newest,
    oldest: (a, b) => a[UPDATE] - b[UPDATE] || Math.abs(a[OFFSET]) - Math.abs(b[OFFSET]),
    highest: (a, b) => byScore(-1)(a, b) || newest(a, b),
    lowest: (a, b) => byScore(1)(a, b) || newest(a, b),
    longest: (a, b) => spoken(b[TEXT]).length - spoken(a[TEXT]).length || newest(a, b),
  };

  function listCompletions() {
    const words = place.q.toLowerCase();
    const hay = words ? searched() : null;
    const update = place.u === "" ? null : Number(place.u);
    const found = data.completions.filter((c, i) =>
      (update === null || c[UPDATE] === update) &&
      (place.k !== "pairs" || c[OFFSET] < 0) && (!words || hay[i].includes(words)));
    found.sort(ORDERS[place.o] || newest);
    const all = data.completions.length.toLocaleString("en");
    byId("count").textContent = data.completions.length
      ? `${found.length.toLocaleString("en")} of ${all} on this page` : "No completion yet.";
    pages(byId("pager"), found, place.s, (c) => c[UPDATE] + "." + c[OFFSET],
      (some) => byId("list").replaceChildren(...some.map((c) => item(c, words))),
      (from) => {
        place.s = from;
        listCompletions();
        keep(false);
      });
  }

  function item(c, words) {
    const meta = el("div", { class: "meta" }, el("b", {}, "update " + c[UPDATE]));
    if (c[OFFSET] < 0 && c[OF]) meta.append(el("span", {}, c[OF]));
    if (c[SCORE] !== null) meta.append(el("span", {}, "score ", el("b", {}, show(c[SCORE]))));
    const rewards = Object.entries(c[REWARDS]);
    if (rewards.length > 1) {
      for (const [name, v] of rewards) {
        meta.append(el("span", {}, `${name} ${v === null ? "abstained" : show(v)}`));
      }
    }
    const node = el("article", { class: "item" }, meta);
    const prompt = data.prompts[c[PROMPT]];
    const beside = c[OFFSET] < 0;
    if (!beside && typeof prompt === "string" && typeof c[TEXT] === "string") {
      const body = el("div", { class: "said", dir: "auto" }, el("span", { class: "prompt" }));
      marked(body.firstChild, prompt, words);
      marked(body, c[TEXT], words);
      if (!c[TEXT]) body.append(el("span", { class: "note" }, " (empty completion)"));
      return clipped(node, body, prompt.length + c[TEXT].length);
    }
    if (typeof prompt === "string") node.append(said(prompt, words, "prompt"));
    else for (const [role, ...texts] of prompt) node.append(turn(role, texts.join("\n"), words, "prompt"));
    const answers = el("div", { class: "both" });
    if (beside) answers.append(answer("reference", c[REFERENCE], words, c[BEFORE]));
    answers.append(answer("policy", c[TEXT], words, beside ? c[SCORE] : null));
    node.append(answers);
    return node;
  }

  function answer(who, text, words, score) {
    const flat = typeof text === "string" ? text : text.map(([role, ...t]) => role + ": " + t.join("\n")).join("\n");
    const label = score === null ? who : `${who}, score ${show(score)}`;
    return turn(label, flat, words, who);
  }

  function turn(label, text, words, kind) {
    const body = said(text, words, kind === "prompt" ? "prompt" : "");
    const node = el("div", { class: "turn " + kind }, el("div", { class: "role" }));
    plain(node.firstChild, label);
    return clipped(node, body, text.length);
  }

  function clipped(node, body, length) {
    node.append(body);
    if (length > LONG) {
      body.classList.add("clipped");
      const more = el("button", { type: "button", class: "more" }, "show all of it");
      more.addEventListener("click", () => {
        body.classList.remove("clipped");
        more.remove();
      });
      node.append(more);
    }
    return node;
  }

  // ---------------------------------------------------------------- steps

  const steps = data.rows.map((row, i) => i).reverse();

  function listSteps() {
    const found = steps.filter((i) => place.t === "all" || data.outcomes[i] === place.t);
    pages(byId("step-pager"), found, place.r, (i) => String(value(data.rows[i], "update")),
      (some) => byId("step-list").replaceChildren(...some.map(step)),
      (from) => {
        place.r = from;
        listSteps();
        keep(false);
      });
  }

  function step(i) {
    const row = data.rows[i], what = data.outcomes[i];
    const told = el("td", { class: "t" }, el("span", { class: "outcome " + what }, what), " ");
    plain(told, data.told[data.steps[i]]);
    const update = value(row, "update");
    const see = el("button", { type: "button", class: "more", title: "its completions" }, show(update));
    see.addEventListener("click", () => {
      Object.assign(place, { u: String(update), s: "" });
      fill();
      listCompletions();
      keep(false);
      byId("completions").scrollIntoView();
    });
    const names = ["objective/score_mean", "trust_region/kl", "objective/ref_kl", "line_search/trials"];
    return el("tr", {}, el("td", {}, see), told, ...names.map((n) => el("td", {}, show(value(row, n)))));
  }

  // ---------------------------------------------------------------- charts

  const updates = data.rows.map((row) => value(row, "update"));

  for (const svg of document.querySelectorAll(".chart svg")) {
    const columns = svg.dataset.columns.split(";").map((pair) => {
      const cut = pair.indexOf("=");
      return [pair.slice(0, cut), pair.slice(cut + 1)];
    });
    const first = Number(svg.dataset.first), last = Number(svg.dataset.last);
    const [left, right, width] = [46, 422, 440]; // of the drawing: see charts.py
    const cursor = svg.querySelector(".cursor");
    let tip = null, at = -1;
    const hide = () => {
      if (tip) tip.remove();
      tip = null;
      cursor.setAttribute("visibility", "hidden");
    };
    const read = (i) => {
      at = i;
      const x = left + ((right - left) * (updates[i] - first)) / (last - first);
      cursor.setAttribute("transform", `translate(${x.toFixed(1)} 0)`);
      cursor.setAttribute("visibility", "visible");
      if (!tip) svg.parentNode.append((tip = el("div", { class: "tip", role: "status" })));
      const lines = columns.map(([name, label]) => {
        let v = value(data.rows[i], name);
        if (name === "objective/eos_rate" && v !== null) v = 1 - v;
        return v === null ? null : el("div", {}, `${label}: ${show(v)}`);
      });
      tip.replaceChildren(el("b", {}, "update " + show(updates[i])), ...lines.filter(Boolean));
    };
    const nearest = (x) => {
      let best = 0;
      for (let i = 1; i < updates.length; i++) {
        if (Math.abs(updates[i] - x) < Math.abs(updates[best] - x)) best = i;
      }
      return best;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      read(nearest(first + ((x - left) / (right - left)) * (last - first)));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && read(updates.length - 1));
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key];
      if (event.key === "Escape") hide();
      if (!by) return;
      event.preventDefault();
      read(Math.max(0, Math.min(updates.length - 1, (at < 0 ? updates.length - 1 : at) + by)));
    });
  }

  // ---------------------------------------------------------------- controls

  const fields = { q: "query", u: "update", o: "order", k: "kind", t: "outcome" };

  function fill() {
    for (const [name, id] of Object.entries(fields)) byId(id).value = place[name];
  }

  for (const outcome of new Set(data.outcomes)) {
    byId("outcome").append(el("option", { value: outcome }, outcome));
  }
  if (!new Set([...data.outcomes, "all"]).has(place.t)) place.t = "all";
  if (!(place.o in ORDERS)) place.o = "newest";
  byId("kind").parentNode.hidden = !data.completions.some((c) => c[OFFSET] < 0);
  byId("filters").hidden = byId("step-filters").hidden = false;
  let typing = 0, typed = 0;
  for (const [name, id] of Object.entries(fields)) {
    byId(id).addEventListener("input", () => {
      typed = Date.now();
      clearTimeout(typing);
      typing = setTimeout(() => {
        place[name] = byId(id).value;
        if (name === "t") place.r = "";
        else place.s = "";
        (name === "t" ? listSteps : listCompletions)();
        keep(false);
      }, id === "query" ? 120 : 0);
    });
  }
  for (const form of [byId("filters"), byId("step-filters")]) {
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  document.addEventListener("keydown", (event) => {
    const writes = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !writes && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      byId("query").focus();
    }
  });

  fill();
  listCompletions();
  listSteps();

  if (memory.again) {
    history.scrollRestoration = "manual";
    for (const id of memory.open || []) if (byId(id)) byId(id).open = true;
    const all = document.querySelectorAll("header, main > section");
    const above = all[memory.section] || all[0];
    window.scrollBy({ top: above.getBoundingClientRect().top - memory.below, behavior: "instant" });
    const focused = memory.focus ? byId(memory.focus) : null;
    if (focused) focused.focus({ preventScroll: true });
    if (focused && memory.caret !== null) focused.setSelectionRange(memory.caret, memory.caret);
  }
  keep(false);

  // ---------------------------------------------------------------- following the run

  if (data.refresh) {
    const follow = byId("follow"), age = byId("age"), live = byId("live");
    const opened = Date.now();
    follow.hidden = false;
    live.checked = memory.live !== false;
    live.addEventListener("change", () => {
      memory.live = live.checked;
      keep(false);
    });
    let held = false;
    addEventListener("pointerdown", () => (held = true));
    addEventListener("pointerup", () => (held = false));
    const ago = (since) => {
      const seconds = Math.max(0, Math.round((Date.now() - since) / 1000));
      if (seconds < 90) return seconds + " s ago";
      return seconds < 5400 ? Math.round(seconds / 60) + " min ago" : Math.round(seconds / 3600) + " h ago";
    };
    setInterval(() => {
      const now = Date.now(), quiet = (now - data.written) / 1000;
      const late = quiet > Math.max(120, 6 * (data.pace || 0));
      follow.classList.toggle("late", late);
      age.textContent = (data.updated ? `last update ${ago(data.updated)}, ` : "") +
        `page written ${ago(data.written)}` +
        (late ? ": the run may have been killed, or nothing writes this page any more" : "");
      const wait = late ? 60 : data.refresh;
      const reads = held || (getSelection() && !getSelection().isCollapsed) || now - typed < 3000;
      if (live.checked && !document.hidden && !reads && now - opened >= wait * 1000) {
        keep(true);
        location.reload();
      }
    }, 1000);
  }
})();
