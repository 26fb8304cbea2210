// What the browser keeps. Where it keeps nothing, as in a strict private window, values last as long as the page.

class Store {
  #open;
  #memory = new Map();

  constructor(open) {
    this.#open = open;
  }

  get(key) {
    try {
      const kept = this.#open().getItem(key);
      return kept === null ? this.#memory.get(key) : JSON.parse(kept);
    } catch {
      return this.#memory.get(key); // denied, or not what this page wrote
    }
  }

  set(key, value) {
    this.#memory.set(key, value);
    try {
      this.#open().setItem(key, JSON.stringify(value));
    } catch {
      // Denied or full: the value in memory serves until the page is closed.
    }
  }
}

// Reading the property itself throws where storage is denied.
export const browserStore = new Store(() => localStorage);
export const tabStore = new Store(() => sessionStorage);
