"""HTTP/1.1 and WebSocket as bytes and events: no clock, socket, loop or log in here."""
