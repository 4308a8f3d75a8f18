// The dashboard's own script: what HTML can't do by itself. No evaluation, nothing from elsewhere.
"use strict";

(() => {
  const csrf = () => document.querySelector('meta[name="csrf"]')?.content ?? "";

  // -- htmx: what a page sends by itself says so, and rests while nobody sees the page -----------
  document.addEventListener("htmx:configRequest", (event) => {
    event.detail.headers["X-CSRF-Token"] = csrf();
    if (event.detail.elt.dataset.live !== undefined) event.detail.headers["X-Live"] = "1";
  });
  document.addEventListener("htmx:beforeRequest", (event) => {
    const { elt } = event.detail;
    if (elt.dataset.live === undefined) return;
    // Not under a reader's hands: what is selected, or a menu that is open, stays.
    const busy = document.hidden || (!getSelection().isCollapsed && elt.contains(getSelection().anchorNode));
    if (busy) event.preventDefault();
  });
  document.addEventListener("htmx:beforeSwap", (event) => {
    // Refusals are pages of ours, too: show them where the answer was expected.
    const { xhr } = event.detail;
    if (xhr.status >= 400 && xhr.getResponseHeader("X-Dashboard") === "1") {
      event.detail.shouldSwap = event.detail.requestConfig.elt.dataset.live === undefined;
    }
  });
  const offline = (yes) => document.querySelectorAll("[data-offline]").forEach((e) => { e.hidden = !yes; });
  document.addEventListener("htmx:sendError", () => offline(true));
  document.addEventListener("htmx:afterRequest", (event) => { if (event.detail.successful) offline(false); });

  // What was just answered is where the reader goes on.
  document.addEventListener("htmx:afterSwap", (event) => {
    const { target } = event.detail;
    if (target.dataset.focus !== undefined) target.focus();
    if (event.detail.xhr.status < 300) event.detail.requestConfig.elt.closest("form[data-resets]")?.reset();
    announce(document);
  });

  // -- things that say so in an attribute --------------------------------------------------------
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    const told = button.parentElement.querySelector("[data-copied]");
    try {
      await navigator.clipboard.writeText(source.textContent.trim());
      if (told) told.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      if (told) told.textContent = "Selected: copy it with Ctrl+C";
    }
  });

  document.addEventListener("change", async (event) => {
    const input = event.target;
    if (input.dataset.reveals) {
      document.getElementById(input.dataset.reveals).classList.toggle("masked", !input.checked);
    }
    if (input.dataset.into && input.files) {
      // As bytes, in base64: text would lose what is not UTF-8 and change the ends of lines.
      const target = document.getElementById(input.dataset.into);
      const [file] = input.files;
      if (!file) { target.value = ""; return; }
      if (file.size > 512 * 1024) { input.setCustomValidity("At most 512 KB"); input.reportValidity(); target.value = ""; return; }
      input.setCustomValidity("");
      const bytes = new Uint8Array(await file.arrayBuffer());
      let binary = "";
      for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
      target.value = btoa(binary);
      target.dispatchEvent(new Event("loaded", { bubbles: true }));
    }
    if (input.dataset.goes !== undefined && input.form) input.form.requestSubmit();
  });

  // A second press of a button that acts must not act twice.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.method !== "post") return;
    if (form.dataset.sent && Date.now() - form.dataset.sent < 1000) { event.preventDefault(); return; }
    form.dataset.sent = Date.now();
  });

  // An answer counts only half a second after the question was shown: a click that was meant for
  // what stood there before is lost.
  for (const button of document.querySelectorAll("[data-settles]")) {
    button.disabled = true;
    setTimeout(() => { button.disabled = false; }, 500);
  }

  // How many calls wait, in the title too, for who has the page in another tab.
  const title = document.title;
  const announce = (root) => {
    const count = Number(root.querySelector("[data-waiting]")?.dataset.waiting ?? 0);
    document.title = count ? `(${count}) ${title}` : title;
  };
  announce(document);

  // -- the one-time link: its code is in the fragment, which no server log and no proxy sees -----
  const link = document.getElementById("one-time");
  if (link && location.hash.startsWith("#code=")) {
    const code = location.hash.slice("#code=".length);
    // Out of the address bar and of the history before anything else happens.
    history.replaceState(null, "", location.pathname);
    link.elements.code.value = code;
    link.requestSubmit();
  }
})();
