// One question over WebSocket with the npm client `ws`: node ws_client.cjs URL [CA-FILE]; prints answer and close code.
const fs = require("node:fs");
const WebSocket = require("ws");

const [url, authority] = process.argv.slice(2);
const socket = new WebSocket(url, authority ? { ca: fs.readFileSync(authority) } : {});
let answer = null;
socket.on("open", () => socket.send('{"x": [1, 2, 3]}'));
socket.on("message", (data) => {
  answer = JSON.parse(data.toString());
  socket.close(1000);
});
socket.on("close", (code) => console.log(JSON.stringify({ answer, code })));
socket.on("error", (error) => {
  console.error(String(error));
  process.exit(1);
});
