// Short forms for the document.

export const element = (id) => document.getElementById(id);

/** A new element, not yet in the document. */
export function create(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** [red, green, blue], each 0 to 255, as a CSS colour. */
export const css = (color) => `rgb(${color.join(" ")})`;
