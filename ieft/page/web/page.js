"use strict";

// Names for screen readers where Gradio gives none, or others than what is written.
function nameImages() {
  for (const item of document.querySelectorAll("#gallery .thumbnail-item")) {
    const text = item.querySelector(".caption-label")?.textContent.replace(/\s+/g, " ").trim();
    if (text && item.getAttribute("aria-label") !== text) item.setAttribute("aria-label", text);
    if (text) item.querySelector("img")?.setAttribute("alt", "");
  }
  const picture = document.querySelector("#picture img"), label = document.querySelector("#picture label");
  if (picture && label && picture.alt !== label.textContent.trim()) picture.alt = label.textContent.trim();
}

new MutationObserver(nameImages).observe(document.documentElement, { childList: true, subtree: true });

// The page's own address becomes the link to what is shown; what else its query holds stays.
function showLink(link, names) {
  const asked = new URLSearchParams(link), kept = new URLSearchParams(location.search);
  for (const name of names) kept.delete(name);
  for (const [name, value] of asked) kept.append(name, value);
  history.replaceState(null, "", location.pathname + (kept.size ? `?${kept}` : ""));
}
