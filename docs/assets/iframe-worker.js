// Browsers refuse to start a worker from a page that was opened from the disk. There, the worker's
// script runs in a hidden frame that passes the same messages, so that the search works.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.waiting = [];
      window.addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      });
      this.frame.addEventListener("load", () => {
        const queue = this.waiting;
        this.waiting = null;
        queue.forEach((data) => this.postMessage(data));
      });
      // A worker answers with postMessage(data), which in a frame would go to the frame itself, and
      // loads more scripts with importScripts.
      this.frame.srcdoc =
        "<script>" +
        "window.postMessage = (data) => parent.postMessage(data, '*');" +
        "window.importScripts = (...names) => Promise.all(names.map((name) =>" +
        "  new Promise((done) => {" +
        "    const script = document.createElement('script');" +
        "    script.src = name;" +
        "    script.onload = done;" +
        "    document.head.append(script);" +
        "  })));" +
        "</scr" + "ipt>" +
        '<script src="' + new URL(address, document.baseURI) + '"></scr' + "ipt>";
      document.body.append(this.frame);
    }

    postMessage(data) {
      if (this.waiting) return void this.waiting.push(data);
      const event = new MessageEvent("message", { data, source: window });
      this.frame.contentWindow.dispatchEvent(event);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
