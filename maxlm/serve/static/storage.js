// Browser storage. If it is unavailable, as in a strict private window, values last as long as the page.

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
      return this.#memory.get(key); // denied, or not written by this page
    }
  }

  set(key, value) {
    this.#memory.set(key, value);
    try {
      this.#open().setItem(key, JSON.stringify(value));
    } catch {
      // Denied or full: the value in memory lasts until the page is closed.
    }
  }
}

// Reading the property itself throws if storage is denied.
export const browserStore = new Store(() => localStorage);
export const tabStore = new Store(() => sessionStorage);
