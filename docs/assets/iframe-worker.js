/* Browsers start no worker for a page that was opened from a folder; the search of this site is one.
   There, a hidden frame of the page does the same work. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html><title>search</title>"
      frame.addEventListener("load", () => {
        this.frame = frame.contentWindow
        const answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
        this.frame.postMessage = answer
        this.frame.importScripts = (...urls) => Promise.all(urls.map((each) => this.run(each)))
        this.run(url).then(() => {
          this.waiting.forEach((data) => this.tell(data))
          this.waiting = null
        })
      }, { once: true })
      document.body.append(frame)
    }

    run(url) {
      const page = this.frame.document
      const script = page.createElement("script")
      script.src = url
      return new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = reject
        page.head.append(script)
      })
    }

    tell(data) {
      this.frame.dispatchEvent(new MessageEvent("message", { data }))
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.tell(data)
    }

    terminate() {
      this.frame.frameElement.remove()
    }
  }
}
