/* Takes the microphone's samples in the browser's audio thread and passes them on as 16-bit PCM at 16 kHz.

Owns: the rate, pieces of a tenth of a second. Does not know: the server, the page. */
"use strict";

const RATE = 16000;
const PIECE = 1600; // samples passed on at a time

class Recorder extends AudioWorkletProcessor {
  piece = new Int16Array(PIECE);
  filled = 0;
  sum = 0; // of the samples since the last one that was written, each by its share
  share = 0;

  process([channels]) {
    for (const sample of channels[0] ?? []) this.take(sample);
    return true;
  }

  /* Each sample written is the mean of those that it stands for; at 16 kHz that is the sample itself. */
  take(sample) {
    const step = RATE / sampleRate;
    const used = Math.min(step, 1 - this.share);
    this.sum += sample * used;
    this.share += used;
    if (this.share < 1 - 1e-9) return;
    this.write(this.sum);
    this.share = step - used;
    this.sum = sample * this.share;
  }

  write(value) {
    this.piece[this.filled++] = Math.round(Math.max(-1, Math.min(1, value)) * 32767);
    if (this.filled < PIECE) return;
    this.port.postMessage(this.piece.slice());
    this.filled = 0;
  }
}

registerProcessor("recorder", Recorder);
