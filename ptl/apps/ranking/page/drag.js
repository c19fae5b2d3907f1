// Dragging with mouse, pen or finger. What may be dragged has data-drag (an answer), what it may be dropped on has
// data-drop. Pointer events, not HTML drag and drop: those do not exist on touch screens and hide what is dragged.

const FAR = 5; // pixels of movement that tell a drag from a click

/** Calls dropped(answer, target) with the element that has data-drop. */
export function draggable(root, dropped) {
  let drag = null;

  const targetAt = (x, y) => document.elementFromPoint(x, y)?.closest("[data-drop]") ?? null;

  function over(target) {
    if (drag.target === target) return;
    drag.target?.classList.remove("over");
    target?.classList.add("over");
    drag.target = target;
  }

  function start() {
    drag.ghost = document.createElement("div");
    drag.ghost.className = "ghost";
    drag.ghost.textContent = String(drag.answer + 1);
    document.body.append(drag.ghost);
    document.body.classList.add("dragging");
  }

  function end(apply) {
    if (!drag) return;
    const { answer, target, ghost } = drag;
    if (target) over(null);
    ghost?.remove();
    document.body.classList.remove("dragging");
    drag = null;
    if (apply && ghost && target) dropped(answer, target);
  }

  root.addEventListener("pointerdown", (event) => {
    const handle = event.target.closest("[data-drag]");
    if (!handle || event.button !== 0 || drag) return;
    if (event.target.hasPointerCapture?.(event.pointerId)) event.target.releasePointerCapture(event.pointerId);
    drag = { answer: Number(handle.dataset.drag), id: event.pointerId, x: event.clientX, y: event.clientY };
  });
  window.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    if (!drag.ghost && Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < FAR) return;
    if (!drag.ghost) start();
    drag.ghost.style.transform = `translate(${event.clientX}px, ${event.clientY}px)`;
    over(targetAt(event.clientX, event.clientY));
  });
  window.addEventListener("pointerup", (event) => {
    if (!drag || event.pointerId !== drag.id) return;
    const moved = Boolean(drag.ghost);
    if (moved) over(targetAt(event.clientX, event.clientY));
    end(true);
    // The click that a browser makes of the same press must not pick the answer as well.
    if (moved) {
      const swallow = (click) => click.stopPropagation();
      window.addEventListener("click", swallow, { capture: true, once: true });
      setTimeout(() => window.removeEventListener("click", swallow, { capture: true }), 0);
    }
  });
  window.addEventListener("pointercancel", () => end(false));
  window.addEventListener("blur", () => end(false));
  window.addEventListener("keydown", (event) => {
    if (drag?.ghost && event.key === "Escape") {
      event.stopPropagation();
      end(false);
    }
  }, { capture: true });
}
