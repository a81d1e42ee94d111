// In a page of `myllm report --watch`: shows the states of the runs, and swaps the page's content when it was redrawn.
"use strict";
(() => {
  const LOOK_EVERY_MS = 2000;
  const badge = document.body.appendChild(document.createElement("p"));
  badge.id = "watching";
  badge.style.cssText = "position: fixed; right: 12px; bottom: 12px; z-index: 3; margin: 0; padding: 5px 12px; "
    + "border-radius: 999px; font-size: 0.8rem; max-width: calc(100vw - 24px); overflow-wrap: anywhere; "
    + "background: var(--card, Canvas); color: var(--soft, GrayText); border: 1px solid var(--rule, GrayText)";

  async function swap() {
    const next = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
    if (next.title !== document.title) return location.reload(); // another kind of page, with styles of its own
    const open = [...document.querySelectorAll("details")].map(part => part.open), top = scrollY;
    document.querySelector("main").replaceWith(next.querySelector("main"));
    document.querySelectorAll("details").forEach((part, index) => part.open = open[index] ?? false);
    document.body.dataset.version = next.body.dataset.version;
    document.dispatchEvent(new Event("swapped"));
    scrollTo(0, top);
  }

  async function look() {
    try {
      const now = await (await fetch("/state")).json();
      badge.textContent = `live: ${now.states}`;
      if (now.version !== document.body.dataset.version) await swap();
    } catch {
      badge.textContent = "no longer live: myllm report has ended";
    }
    setTimeout(look, LOOK_EVERY_MS);
  }
  look();
})();
