"""The two face models of data preparation and generation: YuNet and MediaPipe's landmarker."""

from pathlib import Path

from echolab.model_files import ModelFile, find_model_file

# YuNet; its boxes agree with EchoMimicV3's published face masks (median IoU 0.93).
YUNET = ModelFile(
    "yunet_n_640_640.onnx",
    317466,
    "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31",
    (
        "https://github.com/ShiqiYu/libfacedetection.train/raw/0047ac24afb1/onnx/yunet_n_640_640.onnx",
        "https://github.com/ShiqiYu/libfacedetection.train/raw/master/onnx/yunet_n_640_640.onnx",
    ),
    "Apache-2.0",
)
# MediaPipe's face landmarker: a zip of tflite files.
LANDMARKER = ModelFile(
    "face_landmarker_v2_with_blendshapes.task",
    3758596,
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    (
        "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
    ),
    "Apache-2.0",
)


def find_face_model(model: ModelFile, folder: Path | None = None) -> Path:
    """Return the path of the verified model file, which is downloaded if no folder has it.

    Raise WeightsError if no folder or URL has the file, or if its sha256 differs.
    """
    return find_model_file(model, folder, setting="face_models", download=True)
