// Perfetto's trace processor in Node. usage: node trace_processor.mjs DIRECTORY, where engine_bundle.js and
// trace_processor.wasm of the Perfetto UI lie. Requests come on stdin and replies go to stdout, both as the bytes of
// TraceProcessorRpcStream. The bundle is made for a web worker, so it gets what it expects to find in one.
import fs from "node:fs";
import path from "node:path";
import vm from "node:vm";

const directory = process.argv[2];
const file = (url) => fs.readFileSync(path.join(directory, path.basename(String(url))));
const bytes = (buffer) => buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.length);
const quiet = { log() {}, warn() {}, error: (text) => process.stderr.write(`${text}\n`) };

const worker = {
  ErrorEvent: class {},
  PromiseRejectionEvent: class {},
  WorkerGlobalScope: class {},
  TextDecoder, TextEncoder, URL, TypeError, RangeError, Uint8Array, WebAssembly,
  crypto, performance, setTimeout, clearTimeout,
  console: quiet,
  location: { href: "http://localhost/engine_bundle.js" },
  XMLHttpRequest: class {
    open(_, url) { this.url = url; }
    send() { this.response = bytes(file(this.url)); }
  },
};
worker.self = worker;

const port = { postMessage: (reply) => fs.writeSync(1, reply) };
vm.createContext(worker);
vm.runInContext(file("engine_bundle.js").toString(), worker);
worker.onmessage({ data: port });
await new Promise((resolve) => setTimeout(resolve, 0)); // the engine is made at once, and set up in a promise
for await (const chunk of process.stdin) port.onmessage({ data: new Uint8Array(chunk) });
