// Talk to the server: token, problems, retries. Knows nothing of the page.
export class Problem extends Error {
  constructor(status, body, retryAfter) {
    super(body?.detail || body?.title || `status ${status}`);
    this.status = status;
    this.name = (body?.type || "").split("/").pop() || `status-${status}`;
    this.retryAfter = retryAfter;
  }
}
export class Offline extends Error {}

const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

export class Api {
  constructor(base, { token = null, onToken = null, onWait = () => {}, onOffline = () => {} } = {}) {
    Object.assign(this, { base, token, onToken, onWait, onOffline });
  }
  async once(method, path, { body = null, type = null, accept = "application/json", signal = null } = {}) {
    const headers = { Accept: accept };
    if (type) headers["Content-Type"] = type;
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    let answer;
    try {
      answer = await fetch(new URL(path, this.base), { method, body, headers, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Offline("the server does not answer");
    }
    if (answer.ok) return answer;
    const text = await answer.text();
    let problem = null;
    try { problem = JSON.parse(text); } catch { /* not ours: the status says enough */ }
    throw new Problem(answer.status, problem, Number(answer.headers.get("Retry-After")) || null);
  }
  // Every request may be sent again: ids are content, answers are functions of what is sent.
  async send(method, path, options = {}) {
    for (let attempt = 0; ; attempt++) {
      try {
        const answer = await this.once(method, path, options);
        if (attempt) this.onWait(null);
        return answer;
      } catch (error) {
        if (error instanceof Offline && attempt < 8) {
          const seconds = [1, 2, 4, 8][Math.min(attempt, 3)];
          this.onOffline(seconds);
          await sleep(seconds);
        } else if (error instanceof Problem && error.name === "token-wanted" && this.onToken) {
          this.token = await this.onToken();
        } else if (error instanceof Problem && error.retryAfter && !options.isPreview && attempt < 20) {
          this.onWait(error.retryAfter);
          await sleep(error.retryAfter * (0.8 + 0.4 * Math.random()));
        } else {
          throw error;
        }
      }
    }
  }
  async about() {
    return (await this.send("GET", "v1")).json();
  }
  async upload(bytes, type, view = null) {
    const path = view ? `v1/images?view=${view}` : "v1/images";
    return (await this.send("POST", path, { body: bytes, type })).json();
  }
  async segment(id, request, options = {}) {
    const body = JSON.stringify(request);
    const answer = await this.send("POST", `v1/images/${id}/segment`, { body, type: "application/json", ...options });
    return answer.json();
  }
  // Progress events, then the result.
  async everything(id, request, onProgress, signal) {
    const options = { body: JSON.stringify(request), type: "application/json", accept: "text/event-stream", signal };
    const answer = await this.send("POST", `v1/images/${id}/everything`, options);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Offline("the server went away");
      text += value.replaceAll("\r", "");
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const [event, data] = readEvent(text.slice(0, end));
        text = text.slice(end + 2);
        if (event === "progress") onProgress(data.done, data.total);
        if (event === "result") return data;
        if (event === "problem") throw new Problem(data.status, data, null);
      }
    }
  }
}

function readEvent(block) {
  let event = "", data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    if (line.startsWith("data:")) data += line.slice(5);
  }
  return [event, data ? JSON.parse(data) : null];
}
