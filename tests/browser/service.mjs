// A service of its own for the test: the real program on a free port, killed at the end however that comes.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

export class Service {
  constructor(program, token) {
    Object.assign(this, { program, token, listen: "127.0.0.1:0", data: mkdtempSync(join(tmpdir(), "patrickstar-page-")) });
    process.on("exit", () => {
      this.child?.kill("SIGKILL");
      rmSync(this.data, { recursive: true, force: true });
    });
  }

  /** At the address that it had before, if it had one. */
  async start() {
    this.child = spawn(this.program, ["serve", "--listen", this.listen, "--data", this.data], {
      env: { ...process.env, PATRICKSTAR_TOKEN: this.token }, stdio: ["ignore", "ignore", "pipe"],
    });
    const lines = createInterface({ input: this.child.stderr });
    this.url = await new Promise((found, failed) => {
      lines.on("line", (line) => line.startsWith("listening on ") ? found(line.slice("listening on ".length)) : console.log(`service: ${line}`));
      this.child.on("exit", (code) => failed(new Error(`the service ended with ${code}`)));
    });
    this.listen = new URL(this.url).host;
  }

  async kill() {
    const gone = new Promise((done) => this.child.on("exit", done));
    this.child.kill("SIGKILL");
    await gone;
  }

  async get(path) {
    const answer = await fetch(this.url + path, { headers: { Authorization: `Bearer ${this.token}` } });
    if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
    return answer.json();
  }
}
