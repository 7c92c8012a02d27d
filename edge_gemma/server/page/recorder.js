/* Takes the microphone's samples in the browser's audio thread and passes them on as 16-bit PCM at 16 kHz.

Owns: the rate, pieces of a tenth of a second. Does not know: the server, the page. */

const STEP = 16000 / sampleRate; // samples passed on for each that comes
const PIECE = 1600; // samples passed on at a time

class Recorder extends AudioWorkletProcessor {
  piece = [];
  sum = 0; // of the samples since the last one that was written, each by its share
  share = 0;

  process([channels]) {
    for (const sample of channels[0] ?? []) this.take(sample);
    return true;
  }

  /* Each sample written is the mean of those that it stands for; at 16 kHz that is the sample itself. */
  take(sample) {
    const used = Math.min(STEP, 1 - this.share);
    this.sum += sample * used;
    this.share += used;
    if (this.share < 1 - 1e-9) return;
    this.piece.push(Math.round(Math.max(-1, Math.min(1, this.sum)) * 32767));
    this.share = STEP - used;
    this.sum = sample * this.share;
    if (this.piece.length === PIECE) this.port.postMessage(Int16Array.from(this.piece.splice(0)));
  }
}

registerProcessor("recorder", Recorder);
