"""The page's only script: filters over what is in the page. It never makes HTML of text."""

import base64
import hashlib

SCRIPT = """
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const form = byId("filters"), shown = byId("shown"), stored = byId("stored");
  if (form) {
    const AT_ONCE = 12;
    const all = [...shown.children].concat([...stored.children].map((one) => one.content.firstElementChild));
    const words = new Map();
    const wordsOf = (one) => {
      if (!words.has(one)) words.set(one, one.textContent.toLowerCase());
      return words.get(one);
    };
    let found = all, limit = AT_ONCE;
    const draw = () => {
      shown.replaceChildren(...found.slice(0, limit).map((one) => document.importNode(one, true)));
      byId("more").hidden = found.length <= limit;
      byId("none").hidden = found.length > 0;
      form.querySelector("output").value = `${Math.min(limit, found.length)} of ${found.length} shown`;
    };
    const filter = () => {
      const {iteration, margin, order, words: wanted} = form.elements;
      const text = wanted.value.trim().toLowerCase();
      found = all.filter((one) =>
        (!iteration.value || one.dataset.iteration === iteration.value) &&
        Number(one.dataset.margin) >= Number(margin.value) &&
        (!text || wordsOf(one).includes(text)));
      if (order.value) found.sort((a, b) => b.dataset[order.value] - a.dataset[order.value]);
      limit = AT_ONCE;
      draw();
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    byId("more").addEventListener("click", () => {
      const first = limit;
      limit += AT_ONCE;
      draw();
      const next = shown.children[first];
      if (next) { next.tabIndex = -1; next.focus({preventScroll: true}); }
    });
    form.hidden = false;
    filter();
  }
  const compare = byId("compare");
  if (compare) {
    const pairs = [...document.querySelectorAll("[data-way]")];
    const choose = () => {
      const way = compare.elements.way.value;
      let count = 0;
      for (const one of pairs) {
        one.hidden = Boolean(way) && one.dataset.way !== way;
        count += one.hidden ? 0 : 1;
      }
      compare.querySelector("output").value = `${count} of ${pairs.length} shown`;
    };
    compare.addEventListener("input", choose);
    compare.addEventListener("submit", (event) => event.preventDefault());
    compare.hidden = false;
    choose();
  }
  document.documentElement.dataset.ready = "yes";
})();
"""


def script_digest() -> str:
    """The source that the page's policy allows, and no other."""
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
