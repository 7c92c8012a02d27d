"""A voice for tests, run as a command: reads a text on standard input, writes a WAV file to standard output.

It is what the program espeak-ng does with `--stdin --stdout`, by way of the library in the package espeakng-loader.
"""

import ctypes
import sys
import wave

import espeakng_loader

_SYNCHRONOUS, _UTF8, _SAMPLES_OF_A_WORD = 2, 1, 60


def spoken(text: str) -> tuple[bytes, int]:
    """16-bit samples of one channel, and their rate, Hz."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, _SAMPLES_OF_A_WORD, espeakng_loader.get_data_path().encode(), 0)
    samples = bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int16), ctypes.c_int, ctypes.c_void_p)
    def take(block, count, _):
        if block:
            samples.extend(ctypes.string_at(block, 2 * count))
        return 0

    library.espeak_SetSynthCallback(take)
    library.espeak_SetVoiceByName(b"en-us")
    said = text.encode() + b"\0"
    library.espeak_Synth(said, ctypes.c_size_t(len(said)), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return bytes(samples), rate


if __name__ == "__main__":
    data, rate = spoken(sys.stdin.read())
    with wave.open(sys.stdout.buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data)
