"""Detectors of the DETR family: pictures in, a set of scored boxes out."""

from __future__ import annotations

from nearfar.models.detection.detector import Detections, Detector, DetectorOutput, Match, SetLoss, Target

__all__ = ["Detections", "Detector", "DetectorOutput", "Match", "SetLoss", "Target"]
