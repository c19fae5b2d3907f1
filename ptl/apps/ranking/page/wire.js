// Talking to the server. A verdict is sent until the server says that it is on disk; each has a key of its own, so that
// one which arrived twice is written once.

export class Refused extends Error {}

async function answered(response) {
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const told = body.error || `${response.status} ${response.statusText}`;
  throw response.status >= 500 ? new Error(told) : new Refused(told);
}

export async function get(path, query = {}) {
  return answered(await fetch(`${path}?${new URLSearchParams(query)}`));
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export function newKey() {
  // crypto.randomUUID is absent where the page came over plain http from another machine.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Sends a verdict; calls waiting(reason) before each new try and throws Refused where trying again cannot help. */
export async function send(verdict, waiting) {
  const body = JSON.stringify(verdict);
  for (let wait = 250; ; wait = Math.min(2 * wait, 5000)) {
    try {
      const headers = { "Content-Type": "application/json" };
      return await answered(await fetch("/api/rankings", { method: "POST", headers, body }));
    } catch (error) {
      if (error instanceof Refused) throw error;
      waiting(error.message);
      await pause(wait);
    }
  }
}
