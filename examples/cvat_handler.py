"""The server side of CVAT's SAM plugin, as a Nuclio function, by ONNX Runtime and without torch.

It takes the place of main.py in CVAT's own function for SAM, whose name the plugin asks for. Its
image needs `pip install 'tinyvit[onnx]'` and the folder that `tinyvit export --for cvat` wrote;
TINYVIT_FOLDER says where that is. The plugin loads decoder.onnx of the same folder.
"""

import base64
import json
import os

from tinyvit import Engine, ImageError


def init_context(context):
    """Open the encoder, once in the life of a worker."""
    folder = os.environ.get("TINYVIT_FOLDER", "/opt/nuclio/cvat")
    context.user_data.engine = Engine(folder)


def handler(context, event):
    """An image as base64 -> its embedding [1, 256, 64, 64] float32 as base64."""
    try:
        image = base64.b64decode(event.body["image"])
        (encoded,) = context.user_data.engine.stream(image)
        blob = base64.b64encode(encoded.features.astype("<f4").tobytes())
        status, answer = 200, {"blob": blob.decode()}
    except ImageError as err:
        status, answer = 400, {"error": str(err)}
    return context.Response(
        body=json.dumps(answer), headers={}, content_type="application/json", status_code=status
    )
